"""Tensor parallelism: the matrices of every block divided over ranks (Shoeybi et al. 2019, arXiv:1909.08053).

Queries, keys, values and the first matrix of a feed-forward are divided by columns, the matrices behind them by rows;
one sum over the ranks follows each pair. Which is which is data of the model adapter, or of the diffusers class where
it has a plan of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from xdit_core import (
    EXACT,
    Axis,
    Built,
    Claim,
    Declaration,
    ModelFacts,
    Problem,
    Traffic,
    Transform,
    divisors,
    hookimpl,
)

if TYPE_CHECKING:
    from xdit_core import Plan, Rank


@dataclass(frozen=True)
class Settings:
    """Settings of ``tp``."""

    degree: int | None = field(default=None, metadata={"help": "ranks that divide the matrices; divides the heads"})


@hookimpl
def xdit_settings() -> type[Settings]:
    """``tp.degree``."""
    return Settings


@hookimpl
def xdit_declare(settings: Settings, facts: ModelFacts) -> Declaration:
    """One axis that divides the heads; a change of the modules before their values are read."""
    axis = Axis(
        "tp",
        settings.degree,
        Traffic.PER_LAYER,
        choices=divisors(facts.heads),
        shards_heads=True,
        why=f"{facts.model} has {facts.heads} heads",
        setting="tp.degree",
    )
    return Declaration(
        axes=(axis,),
        claims=(Claim("weights", "it divides the matrices of the blocks"),),
        transforms=(Transform("shard"),),
        fidelity=EXACT,
    )


@hookimpl
def xdit_check(settings: Settings, facts: ModelFacts, plan: Plan) -> Iterator[Problem]:
    """Somebody must say which matrices go together."""
    if not facts.has_tp_plan and plan.degree("tp") > 1:
        yield Problem(
            f"the adapter of {facts.model} does not say how its matrices can be divided", "drop tp, or use usp instead"
        )


@hookimpl
def xdit_build(settings: Settings, rank: Rank) -> Built:
    """The transform, on this rank's part of the mesh."""
    from xdit_tp.strategy import Divide

    return Built(transforms={"shard": Divide(rank)})
