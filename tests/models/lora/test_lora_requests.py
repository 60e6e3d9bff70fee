"""LoRAs that change from request to request: the weights are those of an engine that was loaded with them."""

from __future__ import annotations

import gc
import shutil
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from diffusers import DiffusionPipeline

from helpers.models.families import FAMILIES, STEPS, settings
from helpers.models.lora import loras_of
from helpers.models.tiny import saved
from xdit_core import Engine, ModelError, PlanRefused, UsageError, XditError
from xdit_core.engine import loading
from xdit_core.engine.lora import changing
from xdit_core.testing.runs import generate, plan_for

SD3 = {"height": 24, "width": 40, "steps": STEPS}


def in_turn(plugins, folder, values, asked, prompt="a red fox"):
    """On every rank: the latents of one engine that is asked for LoRAs in turn."""
    torch.set_num_threads(1)
    engine = Engine(plan_for(plugins, folder, values))
    try:
        return [engine.generate(prompt, **changes).latents.clone() for changes in asked]
    finally:
        engine.close()


@pytest.fixture(scope="module")
def models(tiny_sd3_folder, tmp_path_factory):
    """For SD3 and Flux: folder, settings and two LoRAs, which change a text encoder too."""
    flux = FAMILIES["flux"]
    folder = saved(flux.model, tmp_path_factory.mktemp("flux"), **flux.options)
    return {
        "sd3": (str(tiny_sd3_folder), SD3, loras_of(tiny_sd3_folder, tmp_path_factory.mktemp("sd3-loras"))),
        "flux": (folder, settings(flux), loras_of(folder, tmp_path_factory.mktemp("flux-loras"))),
    }


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


def weights_of(engine):
    """All parameters, each with the place where it lies."""
    parts = [part for part in engine.pipe.components.values() if isinstance(part, torch.nn.Module)]
    return {(i, name): p for i, part in enumerate(parts) for name, p in part.named_parameters()}


@pytest.fixture
def engine(models):
    folder, values, loras = models["sd3"]
    with Engine(plan_for([], folder, values)) as made:
        yield made, loras, folder


def test_weights_stay_where_they_are_and_nothing_grows(engine):
    engine, (one, other), _ = engine
    before = {key: (p, p.data_ptr(), p.detach().clone()) for key, p in weights_of(engine).items()}
    sizes = []
    for lora in ({one: 1.0}, {other: 0.5, one: 0.1}, {other: 2.0}, (), {one: 1.0}, ()):
        engine.generate("a red fox", lora=lora)
        gc.collect()
        sizes.append(sum(x.numel() for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)))
    assert len(set(sizes[1:])) == 1
    after = weights_of(engine)
    assert all(after[key] is p and p.data_ptr() == at and torch.equal(p, x) for key, (p, at, x) in before.items())


def test_a_text_encoder_alone(engine, tmp_path):
    engine, _, folder = engine
    (lora,) = loras_of(folder, tmp_path, 1, only="text_encoder")
    plain = engine.generate("a red fox").latents
    changed = engine.generate("a red fox", lora=f"{lora}:3").latents
    assert torch.equal(changed, generate([], folder, {**SD3, "lora": f"{lora}:3"})[0])
    assert not torch.equal(changed, plain) and torch.equal(engine.generate("a red fox").latents, plain)


def test_the_loras_of_the_plan_are_the_default(models):
    folder, values, (one, other) = models["sd3"]
    with Engine(plan_for([], folder, {**values, "lora": f"{one}:0.5"})) as engine:
        first = engine.generate("a red fox").latents
        without = engine.generate("a red fox", lora=()).latents
        assert torch.equal(without, generate([], folder, values)[0])
        engine.generate("a red fox", lora=other)
        assert torch.equal(engine.generate("a red fox").latents, first)


def test_one_that_fails_leaves_the_engine_as_it_was(engine, tmp_path):
    engine, (one, _), folder = engine
    (dora,) = loras_of(folder, tmp_path, 1, use_dora=True)
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"x")
    want = engine.generate("a red fox", lora={one: 0.5}).latents
    refused = [
        (dora, ModelError, "merge it into the checkpoint first"),
        (str(tmp_path), ModelError, "cannot be read as a LoRA for StableDiffusion3Pipeline"),
        (str(tmp_path / "nowhere"), PlanRefused, "there is no .*nowhere"),
        ((one, f"{one}:2"), PlanRefused, "is given twice"),
        *((f"{one}:{scale}", UsageError, "give a number from -100 to 100") for scale in ("nan", "inf", "1e9")),
        *(({one: scale}, UsageError, "give a number from") for scale in ("0.5", True, None, [1])),
        (3, UsageError, "lora=3 is no LoRA"),
    ]
    for lora, kind, sentence in refused:
        with pytest.raises(kind, match=sentence):
            engine.generate("a red fox", lora=lora)
        assert torch.equal(engine.generate("a red fox", lora={one: 0.5}).latents, want)


def test_a_change_that_breaks_off_is_made_up_for(engine, monkeypatch):
    engine, (one, other), _ = engine
    plain, want = (engine.generate("a red fox", lora=lora).latents for lora in ((), {one: 0.5}))
    reads = 0

    def read(*arguments):
        nonlocal reads
        reads += 1
        if reads > 5:
            raise OSError("the disk is gone")
        return loading.read(*arguments)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="the disk is gone"):
        patch.setattr(changing, "read", read)
        engine.generate("a red fox", lora={other: 0.5})
    assert torch.equal(engine.generate("a red fox").latents, plain)
    assert torch.equal(engine.generate("a red fox", lora={one: 0.5}).latents, want)


def with_other_files(folder, values, lora):
    """On every rank: what is said where the second rank has another file for a LoRA, and whether the engine goes on."""
    engine = Engine(plan_for(["tp"], folder, values))
    try:
        plain = engine.generate("a red fox").latents.clone()
        other = mock.patch.object(changing, "fingerprints", lambda paths: ("other",))
        with other if dist.get_rank() else nullcontext():
            try:
                engine.generate("a red fox", lora=lora)
                said = ""
            except XditError as error:
                said = str(error)
        return said, torch.equal(engine.generate("a red fox").latents, plain)
    finally:
        engine.close()


def test_ranks_with_other_files_do_not_mix_them(gloo, models):
    folder, values, (one, _) = models["sd3"]
    for said, same in gloo.run(with_other_files, folder, {**values, "tp.degree": 2}, one, world=2):
        assert same and f"the ranks have different files for {one}; put the same ones on every machine" in said


def test_files_that_change(engine, models, tmp_path):
    """Another file under the same path is read; another checkpoint is not mixed with the one that was loaded."""
    _, _, folder = engine
    shutil.copytree(folder, tmp_path / "model")
    one, other = models["sd3"][2]
    shutil.copytree(one, tmp_path / "lora")
    with Engine(plan_for([], tmp_path / "model", SD3)) as made:
        first = made.generate("a red fox", lora=str(tmp_path / "lora")).latents
        shutil.copytree(other, tmp_path / "lora", dirs_exist_ok=True)
        second = made.generate("a red fox", lora=str(tmp_path / "lora")).latents
        assert not torch.equal(first, second)
        assert torch.equal(made.generate("a red fox", lora=other).latents, second)
        file = tmp_path / "model" / "transformer" / "diffusion_pytorch_model.safetensors"
        file.write_bytes(file.read_bytes())
        with pytest.raises(XditError, match=r"the files of .*model have changed since they were loaded"):
            made.generate("a red fox")


def test_what_cannot_be_read_again_is_refused(models):
    folder, values, (one, _) = models["sd3"]
    pipe = DiffusionPipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    with Engine(plan_for([], folder, {**values, "lora": one}), pipe=pipe) as engine:
        first = engine.generate("a red fox", lora=one).latents  # what is there already
        with pytest.raises(UsageError, match="pipe= does not allow; give lora= when the engine is made"):
            engine.generate("a red fox", lora=())
        assert torch.equal(engine.generate("a red fox").latents, first)


def test_compiled_code_stays_valid(models):
    folder, values, (one, _) = models["sd3"]
    with Engine(plan_for(["compile"], folder, {**values, "compile.backend": "eager"})) as engine:
        plain = engine.generate("a red fox").latents
        with_lora = engine.generate("a red fox", lora={one: 0.5}).latents
        assert torch.equal(engine.generate("a red fox").latents, plain) and not torch.equal(with_lora, plain)


def test_a_scale_that_comes_with_the_call_is_refused(engine):
    engine, (one, _), _ = engine
    call = {"joint_attention_kwargs": {"scale": 0.5}}
    with pytest.raises(PlanRefused, match=r"scales a LoRA by 0\.5"):
        engine.generate("a red fox", lora=one, call=call)
    engine.generate("a red fox", call=call)
