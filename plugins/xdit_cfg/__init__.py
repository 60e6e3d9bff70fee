"""CFG parallelism: the conditional and the unconditional half of classifier-free guidance on two ranks.

Guidance (Ho and Salimans 2022, arXiv:2207.12598) predicts every step twice, with and without the prompt. The two know
nothing of each other until they are combined, so only the predictions are exchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from xdit_core import EXACT, Axis, Built, Claim, Declaration, ModelFacts, Problem, Traffic, Wrap, hookimpl

if TYPE_CHECKING:
    from xdit_core import Plan, Rank


@hookimpl
def xdit_declare(settings: None, facts: ModelFacts) -> Declaration:
    """Always two ranks; it splits the calls of the denoiser."""
    return Declaration(
        axes=(Axis("cfg", 2, Traffic.PER_STEP, messages=True, why="guidance has two halves"),),
        claims=(Claim("guidance", "it gives the two halves of guidance to two ranks"),),
        wraps=(Wrap("forward", "split"),),
        fidelity=EXACT,
    )


@hookimpl
def xdit_check(settings: None, facts: ModelFacts, plan: Plan) -> Iterator[Problem]:
    """Without guidance there is one half only."""
    if not facts.uses_cfg:
        yield Problem(
            f"guidance={plan.run.guidance} makes {facts.model} predict once a step, which leaves nothing for the "
            "second rank of cfg",
            "raise guidance above 1, or drop cfg",
        )


@hookimpl
def xdit_build(settings: None, rank: Rank) -> Built:
    """The wrap, on this rank's group."""
    from xdit_cfg.strategy import Guidance

    guidance = Guidance(rank)
    return Built(wraps={"forward/split": guidance}, job=guidance.job)
