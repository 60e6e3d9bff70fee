"""PipeFusion: displaced patch pipeline parallelism (Fang et al. 2024, arXiv:2405.14430).

The blocks are divided into stages over ranks, the picture into patches over time. After ``warmup`` synchronous steps a
patch attends to fresh keys and values of the patches before it and to those of the step before of the patches behind
it. The result depends on patches, warmup and steps only, never on the number of stages.

Two stages, two patches, past the warm-up; time runs down, and the code of a line is in the file at its left::

    file         stage 0 (first blocks, scheduler)         stage 1 (last blocks, head)
    patches.py   patch 0 of step t: its latents are there
    stage.py     blocks on patch 0, rows sent      ---->   rows of patch 0 received
    cache.py     (attends to patch 0 of step t,            blocks on patch 0
                  patch 1 of step t - 1)
    patches.py   patch 1 of step t begins                  head, prediction of patch 0 sent
    stage.py     blocks on patch 1, rows sent      ---->   rows of patch 1 received
    patches.py   prediction returned: a patch      <----   prediction of patch 0 arrives
                 tensor whose patches are on their way
                 the scheduler steps; patch 0 of           blocks on patch 1, prediction sent
                 step t + 1 waits for patch 0 only
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

from xdit_core import Axis, Built, Declaration, Fidelity, Problem, Stages, Traffic, Wrap, even_bounds, hookimpl

if TYPE_CHECKING:
    from xdit_core import ModelFacts, Plan, Rank


@dataclass(frozen=True)
class Settings:
    """Settings of ``pipefusion``."""

    stages: int | None = field(default=None, metadata={"help": "ranks among which the blocks are divided"})
    patches: int | None = field(default=None, metadata={"help": "parts of the picture in time; default: stages"})
    warmup: int = field(default=1, metadata={"help": "synchronous steps at the start; 0: attend to what exists so far"})
    layers: tuple[int, ...] | None = field(default=None, metadata={"help": "blocks of each stage, such as 12,12"})


@hookimpl
def xdit_settings() -> type[Settings]:
    """``pipefusion.stages``, ``.patches``, ``.warmup``, ``.layers``."""
    return Settings


@hookimpl
def xdit_declare(settings: Settings, facts: ModelFacts) -> Declaration:
    """One axis of stages; lazy at the forward, a stage of the trunk, a cache in the attention."""
    stages = settings.stages
    if stages is None and settings.layers is not None:
        stages = len(settings.layers)

    def split(degree: int) -> tuple[int, ...]:
        if settings.layers is not None:
            return settings.layers
        bounds = even_bounds(facts.blocks, degree)
        # the first stage embeds and steps the scheduler as well, and its blocks may have a text stream of their own
        return tuple(b - a for a, b in pairwise(bounds))[::-1]

    def patches(degrees: Mapping[str, int]) -> int:
        return settings.patches if settings.patches is not None else degrees["stages"]

    def reference(degrees: Mapping[str, int]) -> dict[str, int]:
        own = {"stages": 1, "patches": patches(degrees), "warmup": settings.warmup}
        return {f"pipefusion.{name}": value for name, value in own.items()}

    return Declaration(
        axes=(
            Axis(
                "stages",
                stages,
                Traffic.PER_STAGE,
                choices=tuple(range(1, facts.blocks + 1)),
                messages=True,
                why=f"{facts.model} has {facts.blocks} blocks",
                setting="pipefusion.stages",
            ),
        ),
        wraps=(Wrap("forward", "patches"), Wrap("trunk", "stage"), Wrap("attention", "cache")),
        stages=Stages("stages", split),
        patches=patches,
        fidelity=Fidelity("displaced", reference=reference),
        problems=tuple(problems_of(settings, facts)),
    )


def problems_of(settings: Settings, facts: ModelFacts) -> Iterator[Problem]:
    """List the problems that do not depend on the degrees."""
    if settings.patches is not None and not 1 <= settings.patches <= facts.rows:
        what = f"pipefusion.patches={settings.patches} does not fit {facts.rows} rows of tokens"
        yield Problem(what, f"use 1 to {facts.rows}")
    if settings.warmup < 0:
        yield Problem(f"pipefusion.warmup={settings.warmup} is negative", "use 0 or more, 1 is usual")
    if settings.layers is not None:
        if sum(settings.layers) != facts.blocks or min(settings.layers, default=0) < 1:
            shown = ",".join(map(str, settings.layers))
            yield Problem(
                f"pipefusion.layers={shown} must be positive numbers that add up to the {facts.blocks} blocks of "
                f"{facts.model}",
                "correct them or leave the setting out for a balanced split",
            )
        if settings.stages is not None and settings.stages != len(settings.layers):
            yield Problem(
                f"pipefusion.layers names {len(settings.layers)} stages but pipefusion.stages={settings.stages}",
                "leave out one of the two",
            )


@hookimpl
def xdit_check(settings: Settings, facts: ModelFacts, plan: Plan) -> Iterator[Problem]:
    """List the problems that depend on the completed degrees."""
    if plan.patches > facts.rows:
        yield Problem(
            f"{plan.patches} patches do not fit {facts.rows} rows of tokens",
            f"set pipefusion.patches to {facts.rows} or less",
        )
    if plan.run.steps is not None and settings.warmup > plan.run.steps:
        yield Problem(
            f"pipefusion.warmup={settings.warmup} is more than steps={plan.run.steps}",
            f"use a warmup from 0 to {plan.run.steps}",
        )


@hookimpl
def xdit_build(settings: Settings, rank: Rank) -> Built:
    """The wraps, on this rank's groups."""
    from xdit_pipefusion.cache import DisplacedAttention
    from xdit_pipefusion.patches import PatchLoop
    from xdit_pipefusion.stage import Stage

    stage = Stage(rank)
    loop = PatchLoop(settings.warmup, stage)

    @contextmanager
    def job() -> Iterator[None]:
        with stage.job():
            try:
                yield
            finally:
                loop.forget()

    cache = DisplacedAttention(settings.warmup)
    return Built(wraps={"forward/patches": loop, "trunk/stage": stage, "attention/cache": cache}, job=job)
