"""What of Flux.1 the table of all models does not have: no guidance but the embedded one, schnell, the latents of a
picture a rank."""

from __future__ import annotations

import pytest

from helpers.models.families import FAMILIES, serial, settings
from helpers.models.tiny import saved
from xdit_core import PlanRefused
from xdit_core.testing.runs import generate, plan_for

USP = {"usp.ulysses": 2, "usp.ring": 1}


def test_schnell(gloo, tmp_path):
    """No embedded guidance, another scheduler configuration."""
    family = FAMILIES["flux"]
    folder = saved("flux", tmp_path / "schnell", dev=False)
    want = serial(folder, family.theirs)
    for latents, _ in gloo.run(generate, ["usp"], folder, {**settings(family), **USP}, world=2):
        assert (latents - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("missing", [{"negative": None}, {"call.true_cfg_scale": 1.0}])
def test_embedded_guidance_has_no_second_half(tmp_path, missing):
    folder = saved("flux", tmp_path / "dev")
    with pytest.raises(PlanRefused, match="cfg"):
        plan_for(["cfg"], folder, {**settings(FAMILIES["flux"]), **missing})
