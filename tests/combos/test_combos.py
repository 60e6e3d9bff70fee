"""Every strategy, pair and triple of strategies: equal to serial, equal to the displaced reference, or refused with a
sentence."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from helpers.combos import SETTINGS, decoded, drawn, settings, strategies
from xdit_core import PlanRefused
from xdit_core.testing import assert_close
from xdit_core.testing.runs import plan_for

NAMES = strategies()
MODELS = ("sd3", "pixart_sigma")
SETS = [names for size in (1, 2, 3) for names in combinations(NAMES, size)]

# Why a combination is refused on a CPU: if it holds all of the first and nothing besides the second (None: whatever
# else).
REFUSED = [
    ({"distrifusion", "pipefusion"}, None, "distrifusion and pipefusion both need the slot 'patches'"),
    ({"offload"}, None, "offload needs a GPU"),
    ({"parallel_vae"}, {"compile", "dp", "flash", "offload"}, "parallel_vae has one rank to decode a picture on"),
]


def refusals(names):
    """The sentences that a plan of these strategies must be refused with."""
    chosen = set(names)
    return [
        text
        for all_of, besides, text in REFUSED
        if all_of <= chosen and (besides is None or chosen - all_of <= besides)
    ]


def cases():
    """Strategies and model: triples alternate between the models, such that of the triples that hold a pair, each model
    has every other one; all else is for both. Of the triples with compile there is every third, since it changes blocks
    one by one, and all that others do happens between them or in one opaque operation."""
    for names in SETS:
        turn = sum(map(NAMES.index, names))
        refused = bool(refusals(names))
        if len(names) == 3 and "compile" in names and turn % 3 and not refused:
            continue
        for model in MODELS if len(names) < 3 or refused else [MODELS[turn % len(MODELS)]]:
            yield pytest.param(names, model, id=f"{'+'.join(names)}-{model}")


def test_every_strategy_has_settings_here():
    assert set(NAMES) == set(SETTINGS)


@pytest.mark.parametrize(("names", "model"), cases())
def test_combination(gloo, folders, expected, names, model):
    sentences = list(refusals(names))
    if sentences:
        with pytest.raises(PlanRefused) as caught:
            plan_for(names, folders[model], settings(names, model))
        assert any(sentence in str(caught.value) for sentence in sentences)
        return
    plan = plan_for(names, folders[model], settings(names, model))
    want, kind = expected(plan, model), "image" if "parallel_vae" in names else "latent"
    results = gloo.run(drawn, names, folders[model], settings(names, model, output_type=kind), world=plan.world)
    if kind == "latent":
        for latents, _ in results:
            assert_close(latents, want)
        return
    for mine, other in zip(results[0][1], decoded(folders[model], want), strict=True):
        assert np.abs(np.asarray(mine, dtype=int) - np.asarray(other, dtype=int)).max() <= 1  # a grey level
