"""A strategy with an error: one attention call of one step, or every prediction, is one percent too large; for the
tests of verify."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from xdit_core import EXACT, Built, Declaration, ModelFacts, Rank, Wrap, hookimpl


@dataclass(frozen=True)
class Settings:
    """Settings of ``skewed``; block -1: the prediction behind all blocks."""

    block: int = 2
    step: int = 1
    rank: int = 0


@hookimpl
def xdit_settings() -> type[Settings]:
    """``skewed.block``, ``.step``, ``.rank``."""
    return Settings


@hookimpl
def xdit_declare(settings: Settings, facts: ModelFacts) -> Declaration:
    """Next to the kernel, and around the denoiser."""
    return Declaration(wraps=(Wrap("attention", "kernel"), Wrap("forward", "reuse")), fidelity=EXACT)


@hookimpl
def xdit_build(settings: Settings, rank: Rank) -> Built:
    """Scale."""

    def kernel(inner: Any, call: Any) -> Any:
        out = inner(call)
        wrong = (call.block, call.context.number, rank.mesh.rank) == (settings.block, settings.step, settings.rank)
        return out * 1.01 if wrong else out

    def forward(inner: Any, call: Any) -> Any:
        out = inner(call)
        return out * 1.01 if settings.block < 0 else out

    return Built(wraps={"attention/kernel": kernel, "forward/reuse": forward})
