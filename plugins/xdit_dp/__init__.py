"""Data parallelism: prompts, and the pictures of each prompt, over ranks.

Picture ``i`` of a prompt has the noise of the seed ``seed + i`` whichever rank draws it, so it is the same for every
degree.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from xdit_core import EXACT, Axis, Built, Declaration, ModelFacts, Traffic, Wrap, hookimpl

if TYPE_CHECKING:
    from xdit_core import Rank


@dataclass(frozen=True)
class Settings:
    """Settings of ``dp``."""

    degree: int | None = field(default=None, metadata={"help": "groups of ranks that each draw a part of the pictures"})


@hookimpl
def xdit_settings() -> type[Settings]:
    """``dp.degree``."""
    return Settings


@hookimpl
def xdit_declare(settings: Settings, facts: ModelFacts) -> Declaration:
    """One axis, outside all others; its ranks make different pictures."""
    axis = Axis("dp", settings.degree, Traffic.PER_IMAGE, own_outputs=True, setting="dp.degree")
    return Declaration(axes=(axis,), wraps=(Wrap("request", "split"),), fidelity=EXACT)


@hookimpl
def xdit_build(settings: Settings, rank: Rank) -> Built:
    """The wrap, on this rank's group."""
    from xdit_dp.strategy import Divide

    return Built(wraps={"request/split": Divide(rank)})
