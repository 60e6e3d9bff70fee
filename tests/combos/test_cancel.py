"""A cancelled request: all ranks of a picture leave at the same step, within two, and the next request is as if nothing
had been."""

from __future__ import annotations

import random
from itertools import combinations

import pytest

from helpers.cancelling import cancelled_then_drawn
from helpers.combos import settings, strategies
from xdit_core import PlanRefused, UsageError
from xdit_core.testing.runs import plan_for

NAMES = strategies()
STEPS, PROMPTS = 5, ("a red fox", "a green frog")


def cases():
    """Every strategy and pair, each with a moment and a guidance that are drawn; 12 triples that hold pipefusion."""
    draw = random.Random(4)
    triples = [names for names in combinations(NAMES, 3) if "pipefusion" in names]
    chosen = [names for size in (1, 2) for names in combinations(NAMES, size)] + draw.sample(triples, 12)
    for names in chosen:
        yield pytest.param(names, draw.randrange(5), draw.choice([7.0, 1.0]), id="+".join(names))


@pytest.mark.parametrize(("names", "asked_at", "guidance"), cases())
def test_every_combination(gloo, folders, names, asked_at, guidance):
    values = settings(names, "sd3", steps=STEPS, guidance=guidance)
    try:
        plan = plan_for(names, folders["sd3"], values)
    except (PlanRefused, UsageError) as error:
        pytest.skip(f"refused: {error}")
    results = gloo.run(cancelled_then_drawn, names, folders["sd3"], values, asked_at, PROMPTS, world=plan.world)
    total = STEPS if plan.degree("dp") > 1 else STEPS * len(PROMPTS)  # checkpoints of each owner
    alone = plan.ranks_of_a_picture == 1
    end = asked_at + (0 if alone else 2)
    for owner in filter(plan.owns, range(plan.world)):
        group = [rank for rank in range(plan.world) if owner_of_rank(plan, rank) == owner]
        counts = {results[rank][0] for rank in group if not idle_without_guidance(plan, guidance, rank)}
        assert counts == {min(end, total)}, results
    for _, was_cancelled, same in results:
        assert same and was_cancelled == (end < total), results


def owner_of_rank(plan, rank):
    """The rank that owns the pictures of a rank."""
    at = plan.coordinates(rank)
    return next(
        r
        for r in range(plan.world)
        if plan.owns(r) and all(at[a.name] == plan.coordinates(r)[a.name] for a in plan.axes if a.own_outputs)
    )


def idle_without_guidance(plan, guidance, rank):
    """Ranks that have nothing to compute may come to the end of the loop before the others leave it."""
    at = plan.coordinates(rank)
    return guidance == 1.0 and at.get("cfg", 0) > 0 and at.get("stages", 0) > 0
