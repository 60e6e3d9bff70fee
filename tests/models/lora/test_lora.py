"""LoRA files, written by diffusers: added to weights that are whole or divided, against diffusers' own way of running
them."""

from __future__ import annotations

import pytest
import torch
from diffusers import DiffusionPipeline

from helpers.models.families import FAMILIES, STEPS, settings
from helpers.models.lora import random_lora
from helpers.models.tiny import saved
from xdit_core import ModelError, PlanRefused
from xdit_core.testing import assert_close
from xdit_core.testing.runs import generate, plan_for

SD3 = {"height": 24, "width": 40}


def by_diffusers(folder, loras, images=2, **arguments):
    """Latents of the unmodified pipeline with the adapters as modules of their own."""
    pipe = DiffusionPipeline.from_pretrained(folder, **absent(folder))
    pipe.set_progress_bar_config(disable=True)
    for i, path in enumerate(loras):
        pipe.load_lora_weights(path, adapter_name=f"a{i}")
    pipe.set_adapters([f"a{i}" for i in range(len(loras))], list(loras.values()))
    generators = [torch.Generator().manual_seed(i) for i in range(images)]
    with torch.no_grad():
        return pipe(generator=generators, num_inference_steps=STEPS, output_type="latent", **arguments)[0]


def absent(folder):
    """The third encoder of an SD3 without one."""
    return {"text_encoder_3": None, "tokenizer_3": None} if "sd3" in str(folder) else {}


@pytest.fixture(scope="module")
def sd3(tiny_sd3_folder, tmp_path_factory):
    """A tiny SD3 and two LoRAs of it."""
    folder = str(tiny_sd3_folder)
    loras = []
    for seed in range(2):
        pipe = DiffusionPipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
        loras.append(random_lora(pipe, tmp_path_factory.mktemp("loras") / f"sd3-{seed}", seed))
    return folder, loras


CASES = [
    ([], {}, 1),
    (["usp"], {"usp.ulysses": 2, "usp.ring": 1}, 2),
    (["tp"], {"tp.degree": 2}, 2),
    (["pipefusion"], {"pipefusion.stages": 2, "pipefusion.patches": 2, "pipefusion.warmup": STEPS}, 2),
    (["pipefusion", "tp"], {"pipefusion.stages": 2, "pipefusion.warmup": STEPS, "tp.degree": 2}, 4),
]


@pytest.mark.parametrize(("plugins", "more", "world"), CASES)
def test_equals_diffusers(gloo, sd3, plugins, more, world):
    folder, (one, other) = sd3
    arguments = {
        "prompt": "a red fox",
        "num_images_per_prompt": 2,
        **SD3,
        "guidance_scale": 7.0,
        "max_sequence_length": 5,
    }
    want = by_diffusers(folder, {one: 0.5, other: 1.0}, **arguments)
    plain = generate([], folder, {**SD3, "images": 2, "steps": STEPS})[0]
    assert (want - plain).abs().max() > 1e-2
    values = {**SD3, "images": 2, "steps": STEPS, "lora": (f"{one}:0.5", other), **more}
    for latents, _ in gloo.run(generate, plugins, folder, values, world=world):
        assert_close(latents, want, within=2e-5)


@pytest.mark.parametrize("name", ["flux", "qwen_image", "wan-2.1", "cogvideox-2b", "z_image"])
def test_other_models(gloo, tmp_path, name):
    family = FAMILIES[name]
    folder = saved(family.model, tmp_path / "model", **family.options)
    lora = random_lora(DiffusionPipeline.from_pretrained(folder), tmp_path / "lora")
    images = 1 if family.model == "cogvideox" else 2  # its pipeline makes one video a call
    values = {**settings(family), "images": images, "lora": lora, "tp.degree": 2}
    plain = generate(["tp"], folder, {**values, "lora": (), "tp.degree": 1}, family.subject)[0]
    want = by_diffusers(folder, {lora: 1.0}, images, **family.theirs)
    for latents, _ in gloo.run(generate, ["tp"], folder, values, family.subject, world=2):
        assert_close(latents, want, within=2e-5)
    assert (want - plain).abs().max() > 1e-3


def test_what_is_not_there_or_no_lora(sd3, tmp_path):
    folder, (one, _) = sd3
    with pytest.raises(PlanRefused, match=r"there is no .*nowhere; give a file or folder, with a scale behind it"):
        plan_for([], folder, {"lora": str(tmp_path / "nowhere")})
    with pytest.raises(PlanRefused, match="is given twice"):
        plan_for([], folder, {"lora": (one, f"{one}:2")})
    assert plan_for([], folder, {"lora": one}).digest() != plan_for([], folder).digest()
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"x")
    with pytest.raises(ModelError, match="cannot be read as a LoRA for StableDiffusion3Pipeline"):
        generate([], folder, {"lora": str(tmp_path)})


def test_a_model_without_a_loader(tmp_path, sd3):
    folder = saved("dit", tmp_path / "dit")
    with pytest.raises(ModelError, match="diffusers has no LoRA loader for DiTPipeline; leave out lora="):
        generate([], folder, {**settings(FAMILIES["dit"]), "lora": sd3[1][0]}, "207")


def test_one_that_is_more_than_a_change_of_weights(sd3, tmp_path):
    pipe = DiffusionPipeline.from_pretrained(sd3[0], text_encoder_3=None, tokenizer_3=None)
    dora = random_lora(pipe, tmp_path / "dora", use_dora=True)
    with pytest.raises(ModelError, match="merge it into the checkpoint first"):
        generate([], sd3[0], {"lora": dora})


def test_a_scale_that_comes_with_the_call(sd3):
    """The LoRA is in the weights already: the scale was ignored without a word."""
    folder, (one, _) = sd3
    sentence = r"call.joint_attention_kwargs scales a LoRA by 0.5.*; write the scale behind the path, lora=.*:0.5"
    values = {**SD3, "lora": one, "call.joint_attention_kwargs": '{"scale": 0.5}'}
    with pytest.raises(PlanRefused, match=sentence):
        plan_for([], folder, values)
    with pytest.raises(PlanRefused, match=sentence):
        generate([], folder, {**SD3, "lora": one}, changes={"call": {"joint_attention_kwargs": {"scale": 0.5}}})
    plan_for([], folder, {**values, "call.joint_attention_kwargs": '{"scale": 1.0}'})
    plan_for([], folder, {**values, "lora": ()})
