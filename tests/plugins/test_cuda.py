"""On one CUDA device: the engine is diffusers, and the displaced schedule is that of the CPU."""

from __future__ import annotations

import pytest
import torch

from xdit_core import Engine
from xdit_core.testing.runs import diffusers_latents, generate, plan_for

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CUDA = {"device": "cuda", "dtype": "float32"}


def test_without_a_plugin_it_is_diffusers(tiny_sd3_folder):
    latents, _ = generate([], str(tiny_sd3_folder), CUDA)
    torch.testing.assert_close(latents.cpu(), diffusers_latents(str(tiny_sd3_folder)), atol=1e-3, rtol=1e-3)


def test_the_displaced_schedule_is_that_of_the_cpu(tiny_sd3_folder):
    settings = {"pipefusion.stages": 1, "pipefusion.patches": 4}
    on_cpu, _ = generate(["pipefusion"], str(tiny_sd3_folder), settings)
    latents, _ = generate(["pipefusion"], str(tiny_sd3_folder), {**settings, **CUDA})
    torch.testing.assert_close(latents.cpu(), on_cpu, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(tiny_sd3_folder, dtype):
    engine = Engine(
        plan_for(["pipefusion"], str(tiny_sd3_folder), {"pipefusion.patches": 2, "nproc": 1, "device": "cuda", "dtype": dtype})
    )
    latents = engine.generate("a red fox").latents
    assert latents.dtype == getattr(torch, dtype) and latents.isfinite().all()
