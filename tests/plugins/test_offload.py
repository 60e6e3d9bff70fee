"""Offload: diffusers' hooks on a woven pipeline, or a refusal."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from xdit_core import Engine, PlanRefused
from xdit_core.testing.runs import diffusers_latents, generate, plan_for

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize(
    ("plugins", "settings", "sentence"),
    [
        (["offload"], {}, "offload needs a GPU to bring the weights to, and this plan runs on the CPU; drop offload"),
        (
            ["offload"],
            {"offload.mode": "half", "device": "cuda"},
            "offload.mode=half is unknown; use one of model, sequential",
        ),
        (
            ["offload", "tp"],
            {"offload.mode": "sequential", "device": "cuda", "tp.degree": 2},
            "as tp leaves them do not allow",
        ),
        (
            ["compile", "offload"],
            {"offload.mode": "sequential", "device": "cuda"},
            "use offload.mode=model, or drop compile",
        ),
    ],
)
def test_what_is_refused(tiny_sd3_folder, plugins, settings, sentence):
    with pytest.raises(PlanRefused) as caught:
        plan_for(plugins, str(tiny_sd3_folder), settings)
    assert sentence in str(caught.value)


@pytest.mark.parametrize("mode", ["model", "sequential"])
def test_accepted_on_a_gpu(tiny_sd3_folder, mode):
    plan = plan_for(
        ["offload", "usp"], str(tiny_sd3_folder), {"offload.mode": mode, "device": "cuda", "usp.ulysses": 2}
    )
    assert plan.transforms == (("offload", "offload"),)


def test_layers_of_a_woven_pipeline_can_be_moved_one_by_one(tiny_sd3_folder):
    """The hooks that sequential offload installs, with the CPU as the device that the layers come to."""
    from accelerate import cpu_offload

    settings = {"pipefusion.stages": 1, "pipefusion.patches": 3}
    want, _ = generate(["pipefusion"], str(tiny_sd3_folder), settings)
    engine = Engine(plan_for(["pipefusion"], str(tiny_sd3_folder), settings))
    cpu_offload(engine.pipe.transformer, torch.device("cpu"), offload_buffers=True)
    layers = [m for m in engine.trunks[0].modules() if isinstance(m, nn.Linear)]
    assert layers and all(m.weight.device.type == "meta" for m in layers)
    assert torch.equal(engine.generate("a red fox").latents, want)
    assert all(m.weight.device.type == "meta" for m in layers)


@pytest.mark.cuda
@GPU
@pytest.mark.parametrize("mode", ["model", "sequential"])
def test_equals_serial_and_leaves_the_device_empty(tiny_sd3_folder, mode):
    settings = {"offload.mode": mode, "device": "cuda", "dtype": "float32"}
    engine = Engine(plan_for(["offload"], str(tiny_sd3_folder), settings))
    for _ in range(2):
        latents = engine.generate("a red fox").latents.cpu()
        torch.testing.assert_close(latents, diffusers_latents(str(tiny_sd3_folder)), atol=1e-3, rtol=1e-3)
    assert len(engine.generate("a red fox", output_type="image").images) == 1
    assert all(p.device.type in ("cpu", "meta") for p in engine.pipe.text_encoder.parameters())
