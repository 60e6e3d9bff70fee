"""Find the schedulers of diffusers that fit what a model predicts, from their source text and so without torch.

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
    """What the source text of a scheduler class says.

    Args:
        default: the default of its setting ``prediction_type``, or what it expects if it has none; "" if unknown.
        takes: the values of the setting.
        chooses: it has the setting.
    """

    default: str
    takes: frozenset[str]
    chooses: bool

    def prediction(self, config: Mapping[str, Any]) -> str:
        """What it expects the output of the model to be, with a configuration; "" if unknown."""
        return str(config.get("prediction_type") or self.default) if self.chooses else self.default


def known_schedulers() -> dict[str, Scheduler]:
    """The scheduler classes of the installed diffusers by name."""
    package = find_spec("diffusers")
    folder = Path(package.origin).parent / "schedulers" if package and package.origin else Path()
    schedulers = {}
    for file in sorted(folder.rglob("scheduling_*.py")):
        parts = re.split(r"^class (\w+)\((.*)\):", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
        for name, bases, text in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
            if "SchedulerMixin" in bases.split(", "):
                schedulers[name] = read_class(name, text)
    return schedulers


def read_class(name: str, text: str) -> Scheduler:
    """Read a scheduler from the source text of its class."""
    setting = re.search(r"^\s+prediction_type:[^=]*= *\"(\w+)\"", text, flags=re.MULTILINE)
    if setting:
        lines = "\n".join(line for line in text.splitlines() if "prediction_type" in line)
        takes = {word for word in re.findall(r"[\"'](\w+)[\"']", lines) if word in KINDS}
        return Scheduler(setting[1], frozenset(takes | {setting[1]}), True)
    kind = FLOW if name.startswith("FlowMatch") else ""
    return Scheduler(kind, frozenset({kind} - {""}), False)


def check_scheduler(name: str | None, current: Mapping[str, Any]) -> list[Problem]:
    """Refuse a ``scheduler=`` that is not a class of diffusers, or expects other output than the model gives.

    Args:
        current: configuration of the model's own scheduler, ``_class_name`` included.
    """
    if not name:
        return []
    known = known_schedulers()
    current_class = known.get(str(current.get("_class_name")))
    predicts = current_class.prediction(current) if current_class else ""
    fitting = sorted(other for other, cls in known.items() if cls.default and fits(cls, current, predicts))
    if name not in known:
        near = get_close_matches(name, fitting, n=3) or fitting
        return [Problem(f"scheduler={name} is not a scheduler class of diffusers", f"use one of {', '.join(near)}")]
    if fits(known[name], current, predicts):
        return []
    sentence = f"scheduler={name} does not fit this model, which predicts {predicts}" + (
        " (flow matching)" if predicts == FLOW else ""
    )
    return [Problem(sentence, f"use one of {', '.join(fitting)}")]


def fits(cls: Scheduler, current: Mapping[str, Any], predicts: str) -> bool:
    """Whether a scheduler with the current configuration expects what the model predicts, as far as is known."""
    expected = cls.prediction(current)
    return not predicts or not expected or (expected == predicts and predicts in cls.takes)
