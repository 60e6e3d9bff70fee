"""What single models have that no other has."""

from __future__ import annotations

import pytest

from helpers.models.families import FAMILIES, serial, settings
from helpers.models.tiny import saved
from xdit_core.testing import assert_close
from xdit_core.testing.models import save_tiny_pixart
from xdit_core.testing.runs import generate

USP = {"usp.ulysses": 2, "usp.ring": 1}


def test_rescaled_guidance(gloo, tmp_path):
    """HunyuanDiT's guidance rescale takes a deviation over the whole picture, so every patch must be there."""
    family, folder = FAMILIES["hunyuandit"], saved("hunyuandit", tmp_path / "hunyuandit")
    want = serial(folder, {**family.theirs, "guidance_rescale": 0.7})
    assert (want - serial(folder, family.theirs)).abs().max() > 1e-3
    values = {**settings(family), "call.guidance_rescale": 0.7}
    for latents, _ in gloo.run(generate, ["usp"], folder, {**values, **USP}, world=2):
        assert_close(latents, want)
    late = {**values, "pipefusion.patches": 3, "pipefusion.warmup": 1}
    reference = generate(["pipefusion"], folder, {**late, "pipefusion.stages": 1})[0]
    for latents, _ in gloo.run(generate, ["pipefusion"], folder, {**late, "pipefusion.stages": 2}, world=2):
        assert_close(latents, reference)


@pytest.mark.parametrize(("height", "width"), [(248, 264), (200, 312)])
def test_resolution_binning(gloo, tmp_path, height, width):
    """PixArt draws at the nearest of the sizes that it was trained for; the tokens are those of that size."""
    folder = str(save_tiny_pixart(tmp_path / "pixart", sample_size=32, layers=2))
    family = FAMILIES["pixart_sigma"]
    size = {"height": height, "width": width}
    theirs = {**family.theirs, **size, "use_resolution_binning": True, "num_images_per_prompt": 1}
    want = serial(folder, theirs, images=1)
    assert want.shape[-2] * 2 != height or want.shape[-1] * 2 != width
    values = {**settings(family, images=1), **size, "call.use_resolution_binning": True, **USP}
    for latents, _ in gloo.run(generate, ["usp"], folder, values, world=2):
        assert_close(latents, want)
