"""DistriFusion: displaced patch parallelism (Li et al. 2024, arXiv:2402.19481).

Every rank owns one patch of the picture for the whole run. After ``warmup`` synchronous steps a patch attends to its
own fresh keys and values and to those of the step before of all others, which travel while the ranks compute. Text rows
that go through the blocks belong to the first patch. In a U-Net the same holds for the rows beyond the edges of a patch
that convolutions see, and for the moments of norms (there, "stale_gn" of the authors' code). The result depends on
patches, warmup and steps only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from xdit_core import Axis, Built, Claim, Declaration, Fidelity, ModelFacts, Problem, Traffic, Transform, Wrap, hookimpl

if TYPE_CHECKING:
    from xdit_core import Plan, Rank


@dataclass(frozen=True)
class Settings:
    """Settings of ``distrifusion``."""

    degree: int | None = field(default=None, metadata={"help": "ranks, each with one patch of the picture"})
    warmup: int = field(default=1, metadata={"help": "synchronous steps at the start; 0: attend to what exists so far"})
    patches: int | None = field(
        default=None, metadata={"help": "with degree=1: compute the result of this degree in one process"}
    )


@hookimpl
def xdit_settings() -> type[Settings]:
    """``distrifusion.degree``, ``.warmup``, ``.patches``."""
    return Settings


@hookimpl
def xdit_declare(settings: Settings, facts: ModelFacts) -> Declaration:
    """One axis of patches; a patch at the forward, an exchange of keys and values in the attention."""

    def patches(degrees: Mapping[str, int]) -> int:
        return settings.patches if settings.patches is not None else degrees["distrifusion"]

    def reference(degrees: Mapping[str, int]) -> dict[str, int]:
        own = {"degree": 1, "patches": patches(degrees), "warmup": settings.warmup}
        return {f"distrifusion.{name}": value for name, value in own.items()}

    most = facts.rows // facts.row_unit
    unet = not facts.blocks
    return Declaration(
        axes=(
            Axis(
                "distrifusion",
                settings.degree,
                Traffic.PER_RING_HOP,
                choices=tuple(range(1, most + 1)),
                why=f"the picture has {most} times {facts.row_unit} rows"
                if unet
                else f"the picture has {most} rows of tokens",
                setting="distrifusion.degree",
            ),
        ),
        claims=(Claim("code", "it replaces the calls of convolutions and norms"),) if unet else (),
        wraps=(Wrap("forward", "patches"), *(() if unet else (Wrap("attention", "cache"),))),
        transforms=(Transform("adapt"),) if unet else (),
        patches=patches,
        fidelity=Fidelity("displaced", reference=reference),
        problems=tuple(problems_of(settings, facts)),
    )


def problems_of(settings: Settings, facts: ModelFacts) -> Iterator[Problem]:
    """List the problems that do not depend on the degrees."""
    if settings.warmup < 0:
        yield Problem(f"distrifusion.warmup={settings.warmup} is negative", "use 0 or more, 1 is usual")
    most = facts.rows // facts.row_unit
    if settings.patches is not None and not 1 <= settings.patches <= most:
        yield Problem(
            f"distrifusion.patches={settings.patches} does not fit {facts.rows} rows of tokens", f"use 1 to {most}"
        )


@hookimpl
def xdit_check(settings: Settings, facts: ModelFacts, plan: Plan) -> Iterator[Problem]:
    """List the problems that depend on the completed degrees."""
    degree = plan.degree("distrifusion")
    if settings.patches is not None and degree not in (1, settings.patches):
        yield Problem(
            f"distrifusion.patches={settings.patches} and distrifusion.degree={degree} differ, but every rank has one "
            "patch",
            "leave distrifusion.patches out; with distrifusion.degree=1 it computes the result of that degree in one "
            "process",
        )
    if plan.run.steps is not None and settings.warmup > plan.run.steps:
        yield Problem(
            f"distrifusion.warmup={settings.warmup} is more than steps={plan.run.steps}",
            f"use a warmup from 0 to {plan.run.steps}",
        )


@hookimpl
def xdit_build(settings: Settings, rank: Rank) -> Built:
    """The wraps, on this rank's group."""
    from xdit_distrifusion.strategy import build

    return build(settings.warmup, rank)
