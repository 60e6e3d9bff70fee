"""Pipelines that leave guidance out of some steps by themselves."""

from __future__ import annotations

from helpers.models.families import FAMILIES, settings
from helpers.models.tiny import saved
from xdit_core.testing import assert_close
from xdit_core.testing.runs import generate, plan_for

TRUNCATED = {"call.cfg_truncation": 0.4, "steps": 4}  # Z-Image: guidance at the first steps only
FAMILY = FAMILIES["z_image"]


def test_truncated_guidance(gloo, tmp_path):
    folder = saved(FAMILY.model, tmp_path / "z_image", **FAMILY.options)
    serial = generate([], folder, settings(FAMILY, **TRUNCATED))[0]
    assert (serial - generate([], folder, settings(FAMILY, steps=4))[0]).abs().max() > 1e-3
    for latents, _ in gloo.run(generate, ["cfg"], folder, settings(FAMILY, **TRUNCATED), world=2):
        assert_close(latents, serial)
    late = {**TRUNCATED, "pipefusion.stages": 2, "pipefusion.patches": 3}
    plugins = ["cfg", "pipefusion"]
    one = plan_for(plugins, folder, settings(FAMILY, **late)).reference
    reference = generate(["pipefusion"], folder, {**settings(FAMILY, **TRUNCATED), **one})[0]
    for latents, _ in gloo.run(generate, plugins, folder, settings(FAMILY, **late), world=4):
        assert_close(latents, reference)
