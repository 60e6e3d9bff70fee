"""What can be said of an installed strategy without running anything: its summary, settings and declaration."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from xdit_core.errors import XditError
from xdit_core.records import Declaration, ModelFacts
from xdit_core.registry.discovery import InstalledPlugin
from xdit_core.registry.registry import Registry
from xdit_core.settings import check_class

EXAMPLE = ModelFacts(model="a model", heads=24, blocks=24, rows=64, columns=64, text_tokens=333, pixels_per_token=16)


@dataclass(frozen=True)
class Inspection:
    """An installed strategy.

    Args:
        plugin: its entry point and distribution.
        summary: the first line of its docstring.
        text: its whole docstring.
        settings: its settings class, None if it has none.
        declaration: what it declares for a model of usual size.
        error: why it cannot be loaded, else "".
    """

    plugin: InstalledPlugin
    summary: str = ""
    text: str = ""
    settings: type[Any] | None = None
    declaration: Declaration | None = None
    error: str = ""


def inspect_strategy(installed: InstalledPlugin) -> Inspection:
    """Load one strategy by itself, so that a broken one harms no other."""
    registry, name = Registry(), installed.name
    try:
        registry.select([name])
        plugin = registry.manager.get_plugin(name)
        text = inspect.getdoc(plugin) or ""
        settings = registry.call("xdit_settings", {name: {}}).get(name)
        if settings:
            check_class(settings, name)
        arguments = {name: {"settings": settings() if settings else None, "facts": EXAMPLE}}
        declaration = registry.call("xdit_declare", arguments).get(name)
    except XditError as error:
        return Inspection(installed, error=str(error))
    return Inspection(
        installed,
        summary=text.strip().split("\n")[0],
        text=text,
        settings=settings,
        declaration=declaration if isinstance(declaration, Declaration) else None,
    )
