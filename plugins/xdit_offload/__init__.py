"""Weights wait on the CPU until they are needed, as diffusers has it: component by component, or layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from xdit_core import EXACT, Built, Claim, Declaration, ModelFacts, Problem, Transform, hookimpl

if TYPE_CHECKING:
    from xdit_core import Plan, Rank

MODES = ("model", "sequential")


@dataclass(frozen=True)
class Settings:
    """Settings of ``offload``."""

    mode: str = field(default="model", metadata={"help": "model: a component at a time; sequential: a layer at a time"})


@hookimpl
def xdit_settings() -> type[Settings]:
    """``offload.mode``."""
    return Settings


@hookimpl
def xdit_declare(settings: Settings, facts: ModelFacts) -> Declaration:
    """The last change of the modules."""
    unknown = Problem(f"offload.mode={settings.mode} is unknown", f"use one of {', '.join(MODES)}")
    return Declaration(
        claims=(Claim("placement", "it moves weights between the CPU and the device"),),
        transforms=(Transform("offload"),),
        problems=() if settings.mode in MODES else (unknown,),
        fidelity=EXACT,
    )


@hookimpl
def xdit_check(settings: Settings, facts: ModelFacts, plan: Plan) -> Iterator[Problem]:
    """There must be a device to come to, and layers that can be moved one by one."""
    if plan.device == "cpu":
        yield Problem("offload needs a GPU to bring the weights to, and this plan runs on the CPU", "drop offload")
    if settings.mode == "sequential":
        for phase, name in plan.transforms:
            if phase in ("shard", "compile"):
                yield Problem(
                    f"offload.mode=sequential moves every layer by itself, which the layers as {name} leaves them do "
                    "not allow",
                    f"use offload.mode=model, or drop {name}",
                )


@hookimpl
def xdit_build(settings: Settings, rank: Rank) -> Built:
    """The transform, for this rank's device."""
    from xdit_offload.strategy import Offload

    return Built(transforms={"offload": Offload(settings.mode, rank.device)})
