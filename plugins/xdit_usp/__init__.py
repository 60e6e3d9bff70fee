"""USP: Ulysses x Ring sequence parallelism as one strategy.

Ulysses (Jacobs et al. 2023, arXiv:2309.14509) exchanges heads for rows around the attention; Ring (Liu et al. 2023,
arXiv:2310.01889) passes keys and values around; USP (Fang and Zhao 2024, arXiv:2405.07719) does both over a grid.
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
    TokenLayout,
    Traffic,
    Wrap,
    divisors,
    hookimpl,
    length,
)

if TYPE_CHECKING:
    from xdit_core import Plan, Rank


@dataclass(frozen=True)
class Settings:
    """Settings of ``usp``."""

    ulysses: int | None = field(
        default=None, metadata={"help": "ranks that exchange heads for rows; divides the heads"}
    )
    ring: int | None = field(default=None, metadata={"help": "ranks that pass keys and values around"})


@hookimpl
def xdit_settings() -> type[Settings]:
    """``usp.ulysses`` and ``usp.ring``."""
    return Settings


@hookimpl
def xdit_declare(settings: Settings, facts: ModelFacts) -> Declaration:
    """Two axes that divide the tokens; Ulysses outside, Ring next to the kernel."""
    return Declaration(
        axes=(
            Axis(
                "ring",
                settings.ring,
                Traffic.PER_RING_HOP,
                shards_tokens=True,
                last_resort=True,
                setting="usp.ring",
            ),
            Axis(
                "ulysses",
                settings.ulysses,
                Traffic.PER_LAYER,
                choices=divisors(facts.heads),
                shards_tokens=True,
                shards_heads=True,
                why=f"{facts.model} has {facts.heads} heads",
                setting="usp.ulysses",
            ),
        ),
        claims=(Claim("tokens", "it divides the tokens of every patch over ranks"),),
        wraps=(Wrap("trunk", "gather"), Wrap("attention", "exchange"), Wrap("attention", "ring")),
        fidelity=EXACT,
    )


@hookimpl
def xdit_check(settings: Settings, facts: ModelFacts, plan: Plan) -> Iterator[Problem]:
    """Every rank needs at least one token of every patch."""
    layout = TokenLayout(facts.rows, facts.columns, facts.text_tokens, min(plan.patches, facts.rows))
    smallest = min(length(layout.picture(m, None)) for m in range(layout.patches))
    if plan.shards > smallest:
        yield Problem(
            f"{facts.tokens} tokens in {plan.patches} patches leave fewer than one for each of {plan.shards} ranks",
            f"take a larger picture, or usp.ulysses x usp.ring of at most {smallest}",
        )


@hookimpl
def xdit_build(settings: Settings, rank: Rank) -> Built:
    """The wraps, on this rank's groups."""
    from xdit_usp.strategy import build

    return build(rank)
