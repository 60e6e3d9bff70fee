"""On one CUDA device: the engine is diffusers, the displaced schedule is that of the CPU, and ranks that share the
device agree."""

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
        plan_for(
            ["pipefusion"],
            str(tiny_sd3_folder),
            {"pipefusion.patches": 2, "nproc": 1, "device": "cuda", "dtype": dtype},
        )
    )
    latents = engine.generate("a red fox").latents
    assert latents.dtype == getattr(torch, dtype) and latents.isfinite().all()


SEVERAL = [
    (["usp"], {"usp.ulysses": 2, "usp.ring": 1}, 2),
    (["cfg"], {}, 2),
    (["dp"], {"dp.degree": 2, "images": 2}, 2),
    (["tp"], {"tp.degree": 2}, 2),
    (["pipefusion"], {"pipefusion.stages": 2, "pipefusion.patches": 3}, 2),
    (["distrifusion"], {"distrifusion.degree": 2}, 2),
    (["cfg", "pipefusion"], {"pipefusion.stages": 2, "pipefusion.patches": 3}, 4),
    (["pipefusion", "usp"], {"pipefusion.stages": 2, "pipefusion.patches": 3, "usp.ulysses": 2, "usp.ring": 1}, 4),
]


@pytest.mark.parametrize(
    ("plugins", "settings", "world"), SEVERAL, ids=lambda x: "+".join(x) if isinstance(x, list) else ""
)
def test_ranks_that_share_the_device(gloo, tiny_sd3_folder, plugins, settings, world):
    """Gloo carries the tensors, since NCCL wants a device for each rank."""
    plan = plan_for(plugins, str(tiny_sd3_folder), {**settings, **CUDA})
    images = settings.get("images", 1)
    if plan.displaced:
        reference, _ = generate(list(plan.displaced), str(tiny_sd3_folder), {**plan.reference, **CUDA})
    else:
        reference, _ = generate([], str(tiny_sd3_folder), {**CUDA, "images": images})
    for latents, _ in gloo.run(on_cpu, plugins, str(tiny_sd3_folder), {**settings, **CUDA}, world=world):
        torch.testing.assert_close(latents, reference.cpu(), atol=1e-3, rtol=1e-3)


def on_cpu(plugins, folder, settings):
    """Latents of this rank in the memory of the host."""
    latents, sent = generate(plugins, folder, settings)
    return latents.cpu(), sent
