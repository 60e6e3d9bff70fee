"""Every parameter and buffer of a loaded denoiser is what diffusers' ``from_pretrained`` gives, in every precision."""

from __future__ import annotations

import functools

import diffusers
import pytest
import torch

from helpers.models.families import FAMILIES, STEPS, settings
from helpers.models.tiny import saved
from xdit_core.engine.engine import Engine
from xdit_core.testing.runs import plan_for

DTYPES = ("float32", "bfloat16", "float16")


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """A tiny checkpoint of a family."""

    @functools.cache
    def find(name):
        family = FAMILIES[name]
        return saved(family.model, tmp_path_factory.mktemp(name.replace(".", "_")) / "m", **family.options)

    return find


def tensors(module):
    """Parameters and buffers, those that no checkpoint holds included, and tables that are neither."""
    found = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for name, part in module.named_modules():
        found |= {f"{name}.{key}": value for key, value in vars(part).items() if isinstance(value, torch.Tensor)}
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_as_diffusers_loads_it(folder_of, name, dtype):
    """A cast of the whole module would also cast rotary tables and what a model keeps in float32 (Wan was 2e-2 off)."""
    family, folder = FAMILIES[name], folder_of(name)
    engine = Engine(plan_for([], folder, {**settings(family), "dtype": dtype}))
    absent = {"text_encoder_3": None, "tokenizer_3": None} if family.model == "sd3" else {}
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=getattr(torch, dtype), **absent)
    compared = set()
    for part, module in pipe.components.items():
        if not isinstance(module, torch.nn.Module):
            continue
        mine, theirs = tensors(getattr(engine.pipe, part)), tensors(module)
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            assert mine[key].dtype is value.dtype, (part, key, mine[key].dtype, value.dtype)
            assert torch.equal(mine[key], value), (part, key)
        compared.add(part)
    assert compared >= {engine.rank.spec.checkpoint.denoiser, "vae"}


def test_wan_in_bfloat16_is_diffusers_bit_by_bit(folder_of):
    """The rotary tables stay in float64 or float32, as do norms and the embedding of time."""
    family, folder = FAMILIES["wan-2.1"], folder_of("wan-2.1")
    pipe = diffusers.WanPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    with torch.no_grad():
        want = pipe(**family.theirs, num_inference_steps=STEPS, generator=generators, output_type="latent")[0]
    mine = Engine(plan_for([], folder, {**settings(family), "dtype": "bfloat16"})).generate(family.subject).latents
    assert torch.equal(mine, want)
