"""Which schedulers of diffusers fit what a model predicts: read from the text of diffusers, so without importing it or
torch.

A scheduler made from the configuration of another takes the keys that it knows and its own defaults for the rest; one
that knows no flow matching would read a velocity as noise.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from xdit_core.records import Problem

FLOW = "flow_prediction"
KINDS = ("epsilon", "sample", "v_prediction", FLOW)


@dataclass(frozen=True)
class Scheduler:
    """What the text of a class says.

    Args:
        default: of its setting ``prediction_type``; what it takes if it has no such setting, "" if that is unknown.
        takes: values of the setting.
        chooses: it has the setting.
    """

    default: str
    takes: frozenset[str]
    chooses: bool

    def prediction(self, config: Mapping[str, Any]) -> str:
        """What it takes the model's output for, with a configuration; "" if that is unknown."""
        return str(config.get("prediction_type") or self.default) if self.chooses else self.default


def known_schedulers() -> dict[str, Scheduler]:
    """The scheduler classes of the installed diffusers by name."""
    package = find_spec("diffusers")
    folder = Path(package.origin).parent / "schedulers" if package and package.origin else Path()
    found = {}
    for file in sorted(folder.rglob("scheduling_*.py")):
        parts = re.split(r"^class (\w+)\((.*)\):", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
        for name, bases, text in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
            if "SchedulerMixin" in bases.split(", "):
                found[name] = read_class(name, text)
    return found


def read_class(name: str, text: str) -> Scheduler:
    """A scheduler from the text of its class."""
    setting = re.search(r"^\s+prediction_type:[^=]*= *\"(\w+)\"", text, flags=re.MULTILINE)
    if setting:
        lines = "\n".join(line for line in text.splitlines() if "prediction_type" in line)
        takes = {word for word in re.findall(r"[\"'](\w+)[\"']", lines) if word in KINDS}
        return Scheduler(setting[1], frozenset(takes | {setting[1]}), True)
    kind = FLOW if name.startswith("FlowMatch") else ""
    return Scheduler(kind, frozenset({kind} - {""}), False)


def check_scheduler(name: str | None, current: Mapping[str, Any]) -> list[Problem]:
    """``scheduler=`` must be a class of diffusers, and take the model's output for what it is.

    Args:
        current: configuration of the model's own scheduler, ``_class_name`` included.
    """
    if not name:
        return []
    known = known_schedulers()
    own = known.get(str(current.get("_class_name")))
    predicts = own.prediction(current) if own else ""
    fitting = sorted(other for other, cls in known.items() if cls.default and fits(cls, current, predicts))
    if name not in known:
        near = get_close_matches(name, fitting, n=3) or fitting
        return [Problem(f"scheduler={name} is not a scheduler class of diffusers", f"use one of {', '.join(near)}")]
    if fits(known[name], current, predicts):
        return []
    what = f"scheduler={name} does not fit this model, which predicts {predicts}" + (
        " (flow matching)" if predicts == FLOW else ""
    )
    return [Problem(what, f"use one of {', '.join(fitting)}")]


def fits(cls: Scheduler, current: Mapping[str, Any], predicts: str) -> bool:
    """Whether a scheduler made from the current one's configuration takes the model's output for what it is, as far as
    is known."""
    taken = cls.prediction(current)
    return not predicts or not taken or (taken == predicts and predicts in cls.takes)
