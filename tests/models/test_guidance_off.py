"""Pipelines that leave guidance out of some steps by themselves."""

from __future__ import annotations

import torch

from helpers.models.families import FAMILIES, settings
from helpers.models.tiny import saved
from xdit_core.testing.runs import generate, plan_for

TRUNCATED = {"call.cfg_truncation": 0.4, "steps": 4}  # Z-Image: guidance at the first steps only
FAMILY = FAMILIES["z_image"]


def close(mine, other):
    """Equal in float32: a hundred-thousandth of the largest value."""
    torch.testing.assert_close(mine, other, rtol=0, atol=1e-5 * max(1.0, other.abs().max().item()))


def test_truncated_guidance(gloo, tmp_path):
    folder = saved(FAMILY.model, tmp_path / "z_image", **FAMILY.options)
    serial = generate([], folder, settings(FAMILY, **TRUNCATED))[0]
    assert (serial - generate([], folder, settings(FAMILY, steps=4))[0]).abs().max() > 1e-3
    for latents, _ in gloo.run(generate, ["cfg"], folder, settings(FAMILY, **TRUNCATED), world=2):
        close(latents, serial)
    late = {**TRUNCATED, "pipefusion.stages": 2, "pipefusion.patches": 3}
    plugins = ["cfg", "pipefusion"]
    one = plan_for(plugins, folder, settings(FAMILY, **late)).reference
    reference = generate(["pipefusion"], folder, {**settings(FAMILY, **TRUNCATED), **one})[0]
    for latents, _ in gloo.run(generate, plugins, folder, settings(FAMILY, **late), world=4):
        close(latents, reference)
