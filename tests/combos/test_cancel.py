"""A cancelled request: all ranks of a picture leave at the same step, within two, and the next request is as if nothing
had been."""

from __future__ import annotations

import random
from itertools import combinations

import pytest

from helpers.cancelling import cancelled_then_drawn
from helpers.combos import settings, strategies
from xdit_core.testing.runs import plan_for

ALONE = ("compile", "dp", "flash")  # with these only, parallel_vae has no second rank for a picture
STEPS, PROMPTS = 5, ("a red fox", "a green frog")


def cases():
    """Every strategy and pair that a CPU can run, some triples; the moment and the guidance are drawn.

    Compiled blocks are paired with the strategies that run them in other ways only: a request ends between steps.
    """
    draw = random.Random(4)
    names = [name for name in strategies() if name != "offload"]
    triples = [t for t in combinations(names, 3) if "pipefusion" in t and "distrifusion" not in t]
    for chosen in [t for size in (1, 2) for t in combinations(names, size)] + draw.sample(triples, 10):
        if "compile" in chosen and set(chosen) not in ({"compile"}, {"compile", "pipefusion"}, {"compile", "usp"}):
            continue
        lonely = "parallel_vae" in chosen and set(chosen) <= {"parallel_vae", *ALONE}
        if not lonely and not {"distrifusion", "pipefusion"} <= set(chosen):
            guidance = draw.choice([7.0, 1.0]) if "cfg" not in chosen else 7.0
            yield pytest.param(chosen, draw.randrange(5), guidance, id="+".join(chosen))


@pytest.mark.parametrize(("names", "asked_at", "guidance"), cases())
def test_every_combination(gloo, folders, names, asked_at, guidance):
    values = settings(names, "sd3", steps=STEPS, guidance=guidance)
    plan = plan_for(names, folders["sd3"], values)
    results = gloo.run(cancelled_then_drawn, names, folders["sd3"], values, asked_at, PROMPTS, world=plan.world)
    total = STEPS if plan.degree("dp") > 1 else STEPS * len(PROMPTS)  # checkpoints of each owner
    check(plan, results, asked_at, total)


@pytest.mark.parametrize("asked_at", [1, 2, 4])
@pytest.mark.parametrize("schedule", ["drop", "alternate"])
@pytest.mark.parametrize(("names", "stages"), [(["cfg"], 1), (["cfg", "pipefusion"], 1), (["cfg", "pipefusion"], 2)])
def test_ranks_that_have_nothing_to_compute(gloo, folders, names, stages, schedule, asked_at):
    """Without guidance in some steps the ranks of the other half would run ahead of those that compute."""
    patches = {"pipefusion.stages": stages, "pipefusion.patches": 3, "pipefusion.warmup": 1}
    values = {"steps": 8, **(patches if "pipefusion" in names else {})}
    plan = plan_for(names, folders["sd3"], values)
    arguments = (names, folders["sd3"], values, asked_at, ("a red fox",), schedule)
    check(plan, gloo.run(cancelled_then_drawn, *arguments, world=plan.world), asked_at, 8)


def check(plan, results, asked_at, total):
    """Ranks of a picture have made equally many steps, the request has ended, and the next one is as a fresh engine's.

    Args:
        total: checkpoints of each owner.
    """
    end = asked_at + (0 if plan.ranks_of_a_picture == 1 else 2)
    for owner in filter(plan.owns, range(plan.world)):
        group = [rank for rank in range(plan.world) if owner_of_rank(plan, rank) == owner]
        assert {results[rank][0] for rank in group} == {min(end, total)}, results
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
