"""What is installed: as data for ``--json``, and the page of one model. Without torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from xdit_core.errors import XditError
from xdit_core.registry.discovery import installed
from xdit_core.registry.registry import MODELS, STRATEGIES, Registry
from xdit_launcher.commands import matrix
from xdit_launcher.commands.show import default_of, row, settings_fields, source, type_name
from xdit_launcher.inspection import Inspection, inspect_strategy

SETTINGS = (
    "negative",
    "steps",
    "guidance",
    "height",
    "width",
    "frames",
    "fps",
    "max_sequence_length",
)  # that a model may not take


def as_json(data: object) -> list[str]:
    """The lines of indented JSON."""
    return json.dumps(data, indent=1).split("\n")


def strategies() -> list[dict[str, Any]]:
    """What is known of each installed strategy."""
    everyone = installed(STRATEGIES)
    known = [strategy(inspect_strategy(plugin)) for plugins in everyone.plugins.values() for plugin in plugins]
    return [*known, *({"name": "", "error": notice} for notice in everyone.notices)]


def strategy(inspected: Inspection) -> dict[str, Any]:
    """What is known of one strategy."""
    plugin, declared = inspected.plugin, inspected.declaration
    about: dict[str, Any] = {
        "name": plugin.name,
        "distribution": plugin.distribution,
        "version": plugin.version,
        "error": inspected.error,
    }
    if inspected.error:
        return about
    about |= {"summary": inspected.summary, "settings": settings(inspected.settings, f"{plugin.name}.")}
    if declared:
        about["axes"] = [
            {"name": a.name, "traffic": a.traffic.name.lower(), "setting": a.setting} for a in declared.axes
        ]
        about["owns"] = {claim.slot: claim.why for claim in declared.owns}
        about["fidelity"] = declared.fidelity.kind
        about["wraps"] = [f"{wrap.point}/{wrap.level}" for wrap in declared.wraps]
    return about


def settings(cls: type[Any] | None, prefix: str) -> list[dict[str, Any]]:
    """Name, type, default and help of each setting."""
    return [
        {
            "name": prefix + name,
            "type": type_name(kind),
            "default": default_of(field),
            "help": field.metadata.get("help", ""),
        }
        for name, kind, field in settings_fields(cls)
    ]


def model_list() -> list[dict[str, Any]]:
    """What is known of each installed model."""
    everyone, known = installed(MODELS), []
    for plugins in everyone.plugins.values():
        for plugin in plugins:
            about: dict[str, Any] = {
                "name": plugin.name,
                "distribution": plugin.distribution,
                "version": plugin.version,
            }
            try:
                spec, _ = Registry().model(plugin.name)
            except XditError as error:
                known.append({**about, "error": str(error)})
                continue
            known.append({**about, "error": "", "pipelines": list(spec.checkpoint.pipelines), "source": source(spec)})
    return [*known, *({"name": "", "error": notice} for notice in everyone.notices)]


def model(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of one model.

    Args:
        values: settings such as ``model.path``; with a checkpoint it is known which strategies fit.

    Raises:
        XditError: it is not installed or broken.
    """
    spec, origin = Registry().model(name)
    example = {spec.request.subject: [spec.request.example]} if spec.request.example else {}
    taken = [
        key for key in SETTINGS if spec.request.takes(key) and (spec.latents.frame_step or key not in ("frames", "fps"))
    ]
    return {
        "name": name,
        "from": " ".join(origin),
        "pipelines": list(spec.checkpoint.pipelines),
        "source": source(spec),
        "draws": spec.request.subject,
        "defaults": {**spec.request.defaults, **example},
        "settings": taken,
        "strategies": fitting({"model": name, "device": "cuda", **values})
        if spec.checkpoint.path or "model.path" in values
        else {},
    }


def fitting(values: Mapping[str, Any]) -> dict[str, str]:
    """For each strategy "", or why it does not fit.

    Plans are made with it alone, and then beside one other strategy, which some need.
    """
    names, reasons = Registry().names(STRATEGIES), {}
    for name in names:
        alone = matrix.verdict([name], values)[1]
        fits = not alone or any(not matrix.verdict(sorted({name, other}), values)[1] for other in names)
        reasons[name] = "" if fits else alone
    return reasons


def model_page(name: str, values: Mapping[str, Any]) -> Iterator[str]:
    """What is known of one model, as lines for a person; see `model`."""
    about = model(name, values)
    yield row("model", name)
    yield row("from", about["from"])
    yield row("pipelines", ", ".join(about["pipelines"]))
    yield row("weights", about["source"])
    yield row("draws", f"a {about['draws']}")
    for i, (key, value) in enumerate(about["defaults"].items()):
        shown = ", ".join(map(str, value)) if isinstance(value, list) else value
        yield row("defaults" if i == 0 else "", f"{key}={shown}")
    yield row("takes", ", ".join(f"{key}=" for key in about["settings"]))
    fit = [plugin for plugin, why in about["strategies"].items() if not why]
    yield row("strategies", ", ".join(fit) or f"to see which fit: xdit-launch models show {name} model.path=DIR")
    for plugin, why in about["strategies"].items():
        if why:
            yield row("", f"not {plugin}: {why}")


def pairs(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The matrix: for each pair of strategies its fidelity, or why it is refused."""
    names = matrix.strategies()
    results = []
    for a in names:
        for b in (name for name in names if name >= a):
            kind, why = matrix.verdict(sorted({a, b}), values)
            results.append({"plugins": sorted({a, b}), "result": kind, "why": why})
    return results
