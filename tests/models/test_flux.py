"""Flux.1 under every strategy that its architecture allows, against serial diffusers or the displaced reference."""

from __future__ import annotations

import pytest
import torch
from tiny import saved

from xdit_core.testing.runs import diffusers_latents, generate, plan_for

COMMON = {"model": "flux", "height": 24, "width": 40, "images": 2, "max_sequence_length": 7, "steps": 3}
TRUE_CFG = {"negative": "blue", "call.true_cfg_scale": 4.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Flux."""
    return saved("flux", tmp_path_factory.mktemp("flux") / "dev")


def serial(folder, **more):
    """Plain diffusers."""
    size = {"height": 24, "width": 40, "num_images_per_prompt": 2, "max_sequence_length": 7, "num_inference_steps": 3}
    return diffusers_latents(folder, guidance_scale=3.5, **size, **more)


def close(mine, other):
    """Equal in float32: a hundred-thousandth of the largest value."""
    torch.testing.assert_close(mine, other, rtol=0, atol=1e-5 * max(1.0, other.abs().max().item()))


def test_without_a_plugin_it_is_diffusers(folder):
    assert torch.equal(generate([], folder, COMMON)[0], serial(folder))


EXACT = [
    (["usp"], {"usp.ulysses": 2, "usp.ring": 1}, 2),
    (["usp"], {"usp.ulysses": 1, "usp.ring": 3}, 3),
    (["usp"], {"usp.ulysses": 2, "usp.ring": 2}, 4),
    (["tp"], {"tp.degree": 2}, 2),
    (["tp", "usp"], {"tp.degree": 2, "usp.ulysses": 2, "usp.ring": 1}, 4),
    (["dp"], {"dp.degree": 2}, 2),
]


@pytest.mark.parametrize(("plugins", "settings", "world"), EXACT)
def test_equals_serial(gloo, folder, plugins, settings, world):
    want = serial(folder)
    for latents, _ in gloo.run(generate, plugins, folder, {**COMMON, **settings}, world=world):
        close(latents, want)


@pytest.mark.parametrize("plugins", [["cfg"], ["cfg", "usp"], ["cfg", "tp"]])
def test_true_guidance_over_two_ranks(gloo, folder, plugins):
    want = serial(folder, true_cfg_scale=4.0, negative_prompt="blue")
    more = {"usp.ulysses": 2, "usp.ring": 1} if "usp" in plugins else {"tp.degree": 2} if "tp" in plugins else {}
    for latents, _ in gloo.run(generate, plugins, folder, {**COMMON, **TRUE_CFG, **more}, world=2 * len(plugins)):
        close(latents, want)


DISPLACED = [
    (["pipefusion"], {"pipefusion.stages": 2}, 2),
    (["pipefusion"], {"pipefusion.stages": 5}, 5),
    (["pipefusion", "usp"], {"pipefusion.stages": 2, "usp.ulysses": 2, "usp.ring": 1}, 4),
    (["pipefusion", "tp"], {"pipefusion.stages": 2, "tp.degree": 2}, 4),
    (["cfg", "pipefusion"], {"pipefusion.stages": 2, **TRUE_CFG}, 4),
    (["distrifusion"], {"distrifusion.degree": 3}, 3),
    (["distrifusion", "usp"], {"distrifusion.degree": 2, "usp.ulysses": 1, "usp.ring": 2}, 4),
]


@pytest.mark.parametrize("warmup", [0, 1])
@pytest.mark.parametrize(("plugins", "settings", "world"), DISPLACED)
def test_equals_the_displaced_reference(gloo, folder, plugins, settings, world, warmup):
    late = next(n for n in plugins if n in ("pipefusion", "distrifusion"))
    values = {**COMMON, **settings, f"{late}.warmup": warmup, **({"pipefusion.patches": 3} if late == "pipefusion" else {})}
    more = TRUE_CFG if "cfg" in plugins else {}
    reference = generate([late], folder, {**COMMON, **more, **plan_for(plugins, folder, values).reference})[0]
    assert (reference - (serial(folder) if not more else 0)).abs().max() > 1e-3
    for latents, _ in gloo.run(generate, plugins, folder, values, world=world):
        close(latents, reference)


@pytest.mark.parametrize("stages", [1, 3])
def test_warmup_is_bit_equal_to_serial(gloo, folder, stages):
    values = {**COMMON, "pipefusion.stages": stages, "pipefusion.patches": 2, "pipefusion.warmup": 3}
    for latents, _ in gloo.run(generate, ["pipefusion"], folder, values, world=stages):
        assert torch.equal(latents, serial(folder))


def test_schnell(gloo, tmp_path):
    """No embedded guidance, another scheduler configuration."""
    folder = saved("flux", tmp_path / "schnell", dev=False)
    want = serial(folder)
    for latents, _ in gloo.run(generate, ["usp"], folder, {**COMMON, "usp.ulysses": 2, "usp.ring": 1}, world=2):
        close(latents, want)


def test_embedded_guidance_has_no_second_half(folder):
    from xdit_core import PlanRefused

    with pytest.raises(PlanRefused, match="cfg"):
        plan_for(["cfg"], folder, COMMON)
