"""LoRAs that change from request to request: the weights are those of an engine that was loaded with them."""

from __future__ import annotations

import pytest
import torch
from diffusers import DiffusionPipeline

from helpers.models.families import FAMILIES, STEPS, settings
from helpers.models.lora import random_lora
from helpers.models.tiny import saved
from xdit_core import Engine
from xdit_core.testing.runs import generate, plan_for

SD3 = {"height": 24, "width": 40, "steps": STEPS}


def in_turn(plugins, folder, values, asked, prompt="a red fox"):
    """On every rank: the latents of one engine that is asked for LoRAs in turn, and what a digest of its weights is."""
    torch.set_num_threads(1)
    engine = Engine(plan_for(plugins, folder, values))
    try:
        return [engine.generate(prompt, **changes).latents.clone() for changes in asked]
    finally:
        engine.close()


@pytest.fixture(scope="module")
def models(tiny_sd3_folder, tmp_path_factory):
    """For SD3 and Flux: folder, settings, prompt and two LoRAs, which change a text encoder too."""
    flux = FAMILIES["flux"]
    folders = {"sd3": str(tiny_sd3_folder), "flux": saved(flux.model, tmp_path_factory.mktemp("flux"), **flux.options)}
    found = {}
    for name, folder in folders.items():
        absent = {"text_encoder_3": None, "tokenizer_3": None} if name == "sd3" else {}
        loras = []
        for seed in range(2):
            pipe = DiffusionPipeline.from_pretrained(folder, **absent)
            loras.append(random_lora(pipe, tmp_path_factory.mktemp("loras") / f"{name}{seed}", seed))
        found[name] = (folder, SD3 if name == "sd3" else settings(flux), loras)
    return found


CASES = [
    ([], {}, 1),
    (["usp"], {"usp.ulysses": 2, "usp.ring": 1}, 2),
    (["tp"], {"tp.degree": 2}, 2),
    (["pipefusion"], {"pipefusion.stages": 2, "pipefusion.patches": 2, "pipefusion.warmup": STEPS}, 2),
]


@pytest.mark.parametrize("name", ["sd3", "flux"])
@pytest.mark.parametrize(("plugins", "more", "world"), CASES)
def test_equals_a_fresh_engine_bit_by_bit(gloo, models, name, plugins, more, world):
    folder, values, (one, other) = models[name]
    values = {**values, **more}
    asked = [(), {one: 0.5}, (f"{other}:-1.5", f"{one}:0.5"), f"{other}:0.25", None]
    changes = [{} if lora is None else {"lora": lora} for lora in asked]
    results = gloo.run(in_turn, plugins, folder, values, changes, world=world)
    fresh = [
        gloo.run(generate, plugins, folder, {**values, "lora": lora}, world=world)
        for lora in ((), (f"{one}:0.5",), (f"{one}:0.5", f"{other}:-1.5"))
    ]
    for latents, *expected in zip(results, *fresh, strict=True):
        assert torch.equal(latents[0], expected[0][0]) and torch.equal(latents[4], latents[0])
        assert torch.equal(latents[1], expected[1][0]) and torch.equal(latents[2], expected[2][0])
        assert len({tuple(x.flatten().tolist()) for x in latents}) == 4
