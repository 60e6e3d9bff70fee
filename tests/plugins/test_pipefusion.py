"""PipeFusion: serial in warm-up, and past it the same result for every number of stages and every split of the tokens."""

from __future__ import annotations

import pytest
import torch

from xdit_core import PlanRefused
from xdit_core.testing.runs import diffusers_latents, generate, plan_for


def displaced(folder, **settings):
    """The reference: the same schedule in one process."""
    one = {**{f"pipefusion.{k}": v for k, v in settings.items()}, "pipefusion.stages": 1}
    return generate(["pipefusion"], str(folder), one)[0]


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_warmup_is_bit_equal_to_serial(gloo, tiny_sd3_folder, stages):
    settings = {"pipefusion.stages": stages, "pipefusion.warmup": 4}
    results = gloo.run(generate, ["pipefusion"], str(tiny_sd3_folder), settings, world=stages)
    serial = diffusers_latents(str(tiny_sd3_folder))
    for latents, _ in results:
        assert torch.equal(latents, serial)


@pytest.mark.parametrize(("patches", "warmup"), [(2, 1), (3, 1), (4, 2), (8, 1), (3, 0)])
def test_result_does_not_depend_on_stages(gloo, tiny_sd3_folder, patches, warmup):
    reference = displaced(tiny_sd3_folder, patches=patches, warmup=warmup)
    assert not torch.allclose(reference, diffusers_latents(str(tiny_sd3_folder)), atol=1e-3)
    for stages in (2, 4):
        settings = {"pipefusion.stages": stages, "pipefusion.patches": patches, "pipefusion.warmup": warmup}
        results = gloo.run(generate, ["pipefusion"], str(tiny_sd3_folder), settings, world=stages)
        for latents, _ in results:
            torch.testing.assert_close(latents, reference, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("ulysses", "ring", "stages"), [(2, 1, 2), (1, 2, 2), (2, 2, 2), (4, 1, 2), (2, 2, 1)])
@pytest.mark.parametrize(("patches", "warmup"), [(4, 1), (3, 0)])
def test_with_usp_equals_the_displaced_reference(gloo, tiny_sd3_folder, ulysses, ring, stages, patches, warmup):
    """xDiT 0.7 caches rank-major in warm-up and patch-major after it: its first displaced step fails this."""
    reference = displaced(tiny_sd3_folder, patches=patches, warmup=warmup)
    settings = {"usp.ulysses": ulysses, "usp.ring": ring}
    settings |= {"pipefusion.stages": stages, "pipefusion.patches": patches, "pipefusion.warmup": warmup}
    world = ulysses * ring * stages
    results = gloo.run(generate, ["usp", "pipefusion"], str(tiny_sd3_folder), settings, world=world)
    for latents, _ in results:
        torch.testing.assert_close(latents, reference, atol=2e-5, rtol=1e-5)
