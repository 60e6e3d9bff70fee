"""A pipeline from the user's hands takes the way of one from a folder: the same result, and refused where it cannot be
honoured."""

from __future__ import annotations

import functools

import diffusers
import pytest
import torch
from peft import LoraConfig

from helpers.models.families import FAMILIES, settings
from helpers.models.lora import random_lora
from helpers.models.tiny import saved
from xdit_core import ModelError, PlanRefused
from xdit_core.engine.engine import Engine
from xdit_core.testing.runs import generate, plan_for

STAGES = {"pipefusion.stages": 2, "pipefusion.patches": 2, "pipefusion.warmup": 1}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """A tiny checkpoint of a family."""

    @functools.cache
    def find(name):
        family = FAMILIES[name]
        return saved(family.model, tmp_path_factory.mktemp(name.replace(".", "_")) / "m", **family.options)

    return find


def loaded(folder, cls=diffusers.DiffusionPipeline, **more):
    """A pipeline as a user loads it."""
    absent = {"text_encoder_3": None, "tokenizer_3": None} if "sd3" in str(folder) else {}
    return cls.from_pretrained(folder, **absent, **more)


def given(plugins, folder, values, subject="a red fox", **more):
    """As ``generate``, with a pipeline that is loaded already."""
    torch.set_num_threads(1)
    engine = Engine(plan_for(plugins, folder, values), pipe=loaded(folder, **more))
    try:
        return engine.generate(subject).latents.clone()
    finally:
        engine.close()


CASES = [
    ("sd3", ["pipefusion"], STAGES, 2),
    ("pixart_sigma", ["pipefusion"], STAGES, 2),
    ("flux", ["tp"], {"tp.degree": 2}, 2),  # its packed weights are divided part by part
    ("wan-2.2", ["pipefusion", "tp"], {**STAGES, "tp.degree": 2}, 4),
    ("hunyuandit", ["usp"], {"usp.ulysses": 2, "usp.ring": 1}, 2),
    ("sdxl", ["distrifusion"], {"distrifusion.degree": 2}, 2),
]


@pytest.mark.parametrize(("name", "plugins", "more", "world"), CASES)
def test_equals_the_one_from_a_folder(gloo, folder_of, name, plugins, more, world):
    """Blocks of other stages were kept, and divided weights were cut at the wrong places, where the pipeline came
    ready-made."""
    family, folder = FAMILIES[name], folder_of(name)
    values = {**settings(family, images=1), **more}
    want = gloo.run(generate, plugins, folder, values, family.subject, world=world)[0][0]
    for latents in gloo.run(given, plugins, folder, values, family.subject, world=world):
        assert torch.equal(latents, want)


@pytest.mark.parametrize("name", FAMILIES)
def test_facts_are_those_of_the_folder(folder_of, name):
    """Every family is accepted as diffusers loads it, and again after it was used."""
    family, folder = FAMILIES[name], folder_of(name)
    pipe = loaded(folder)
    plan = plan_for([], folder, settings(family))
    engine = Engine(plan, pipe=pipe)
    assert engine.pipe is not pipe and type(engine.pipe) is type(pipe)
    pipe.set_progress_bar_config(disable=True)
    pipe(**family.theirs, num_inference_steps=2, output_type="latent")
    Engine(plan, pipe=pipe)


def test_the_users_pipeline_is_left_as_it_was(folder_of, tmp_path):
    """Its modules, values and results stay; a LoRA of the plan is added to ours alone."""
    family, folder = FAMILIES["sd3"], folder_of("sd3")
    lora = random_lora(loaded(folder), tmp_path / "lora")
    pipe = loaded(folder)
    pipe.set_progress_bar_config(disable=True)

    def use():
        with torch.no_grad():
            return pipe(
                **family.theirs, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="latent"
            )[0]

    before, result = (
        {n: dict(c.state_dict()) for n, c in pipe.components.items() if isinstance(c, torch.nn.Module)},
        use(),
    )
    before = {n: {k: v.clone() for k, v in state.items()} for n, state in before.items()}
    values = {**settings(family), "lora": f"{lora}:0.5"}
    mine = Engine(plan_for([], folder, values), pipe=pipe).generate("a red fox").latents
    assert torch.equal(mine, generate([], folder, values)[0])
    assert (mine - generate([], folder, settings(family))[0]).abs().max() > 1e-2
    for name, state in before.items():
        after = getattr(pipe, name).state_dict()
        assert after.keys() == state.keys() and all(torch.equal(after[k], v) for k, v in state.items())
    assert torch.equal(use(), result)


def test_its_precision_is_kept(folder_of):
    """A plan without dtype= takes that of the pipeline; another one is refused, as a cast would not be a load."""
    family, folder = FAMILIES["wan-2.1"], folder_of("wan-2.1")
    pipe = loaded(folder, dtype=torch.bfloat16)
    mine = Engine(plan_for([], folder, settings(family)), pipe=pipe)
    assert mine.rank.dtype is torch.bfloat16
    want = generate([], folder, {**settings(family), "dtype": "bfloat16"})[0]
    assert torch.equal(mine.generate(family.subject).latents, want)
    with pytest.raises(PlanRefused, match=r"pipe= is in bfloat16 and the plan says dtype=float16; leave out dtype="):
        Engine(plan_for([], folder, {**settings(family), "dtype": "float16"}), pipe=pipe)


def cast(pipe):
    """A cast after loading also casts the rotary tables: the user sees the result of that, and so do we."""
    pipe.to(torch.bfloat16)


def test_buffers_that_the_user_has_cast(folder_of):
    family, folder = FAMILIES["wan-2.1"], folder_of("wan-2.1")
    pipe = loaded(folder)
    cast(pipe)
    mine = Engine(plan_for([], folder, settings(family)), pipe=pipe)
    theirs = dict(pipe.transformer.named_buffers())
    assert theirs and all(
        torch.equal(b, theirs[n]) and b.dtype is theirs[n].dtype for n, b in mine.pipe.transformer.named_buffers()
    )


def free_u(pipe):
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.3, b2=1.4)


def adapters(pipe):
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))


def encoder_adapters(pipe):
    pipe.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))


def processors(pipe):
    class MyProcessor(diffusers.models.attention_processor.JointAttnProcessor2_0):
        """Changes the attention."""

    pipe.transformer.set_attn_processor(MyProcessor())


def hooks(pipe):
    pipe.transformer.register_forward_pre_hook(lambda module, arguments: None)


def casting(pipe):
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def offloading(pipe):
    pipe.vae.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")


def meta(pipe):
    pipe.transformer.to("meta")


def quantized(pipe):
    pipe.text_encoder.hf_quantizer = object()


def own_forward(pipe):
    block = pipe.transformer.transformer_blocks[1]
    block.forward = lambda *args, **kwargs: type(block).forward(block, *args, **kwargs)


def other_layer(pipe):
    pipe.transformer.transformer_blocks[0].ff.net[2] = torch.nn.Identity()


def without(pipe):
    pipe.transformer = None


REFUSED = [
    (
        "sdxl",
        free_u,
        r"unet of pipe= was changed after it was made: up_blocks\.\d has .*1=.*; give the pipeline as it was loaded",
    ),
    ("sd3", adapters, r"transformer of pipe= has adapters \(default\).*; merge them with pipe.fuse_lora\(\)"),
    ("sd3", encoder_adapters, r"text_encoder of pipe= has adapters \(default\)"),
    ("sd3", processors, "transformer of pipe= was changed .* has the processor MyProcessor"),
    ("sd3", hooks, "transformer of pipe= was changed .* it has forward hooks"),
    ("sd3", casting, "transformer of pipe= has hooks of accelerate or diffusers"),
    ("sd3", offloading, "vae of pipe= has hooks of accelerate or diffusers"),
    ("sd3", meta, "transformer of pipe= has no weights yet"),
    ("sd3", quantized, "text_encoder of pipe= is quantized"),
    ("sd3", own_forward, r"transformer_blocks.1 has a forward of its own"),
    ("sd3", other_layer, r"transformer_blocks.0.ff.net.2 is a Identity and was a Linear"),
    ("sd3", without, "pipe= has no transformer; give a whole pipeline"),
]


@pytest.mark.parametrize(("name", "change", "sentence"), REFUSED, ids=lambda x: getattr(x, "__name__", None))
def test_what_cannot_be_honoured_is_refused(folder_of, name, change, sentence):
    """These were dropped without a word, or ended in a traceback, under some strategy or other."""
    pipe = loaded(folder_of(name))
    change(pipe)
    with pytest.raises(PlanRefused, match=sentence):
        Engine(plan_for([], folder_of(name), settings(FAMILIES[name])), pipe=pipe)


def test_another_class_of_pipelines(folder_of):
    """A PAG or ControlNet pipeline calls the denoiser in its own way, which strategies do not know."""
    parts = loaded(folder_of("sd3")).components
    pag = diffusers.StableDiffusion3PAGPipeline(
        **{n: c for n, c in parts.items() if c is not None}, text_encoder_3=None, tokenizer_3=None
    )
    with pytest.raises(
        PlanRefused, match="pipe= is a StableDiffusion3PAGPipeline, and model=sd3 knows only StableDiffusion3Pipeline"
    ):
        Engine(plan_for([], folder_of("sd3"), settings(FAMILIES["sd3"])), pipe=pag)
    xl = loaded(folder_of("sdxl"))
    net = diffusers.ControlNetModel.from_unet(xl.unet)
    control = diffusers.StableDiffusionXLControlNetPipeline(**xl.components, controlnet=net)
    with pytest.raises(PlanRefused, match="pipe= is a StableDiffusionXLControlNetPipeline"):
        Engine(
            plan_for(["distrifusion"], folder_of("sdxl"), {**settings(FAMILIES["sdxl"]), "distrifusion.degree": 1}),
            pipe=control,
        )


def test_one_that_another_engine_has(folder_of):
    plan = plan_for([], folder_of("sd3"), settings(FAMILIES["sd3"]))
    engine = Engine(plan, pipe=loaded(folder_of("sd3")))
    with pytest.raises(PlanRefused, match="progress_bar of pipe= was replaced, by another Engine or by hand"):
        Engine(plan, pipe=engine.pipe)


def test_one_of_another_shape(folder_of, tmp_path):
    from xdit_core.testing.models import save_tiny_sd3, tiny_sd3

    folder = save_tiny_sd3(tmp_path / "sd3")
    with pytest.raises(PlanRefused, match=r"pipe= has blocks=3 where the plan was made for blocks=4.*model.path="):
        Engine(plan_for([], str(folder)), pipe=tiny_sd3(layers=3))


def test_a_lora_that_does_not_fit(folder_of, tmp_path):
    lora = random_lora(loaded(folder_of("wan-2.1")), tmp_path / "lora")
    with pytest.raises(ModelError, match=r"lora="):
        Engine(
            plan_for([], folder_of("sd3"), {**settings(FAMILIES["sd3"]), "lora": lora}), pipe=loaded(folder_of("sd3"))
        )


def test_merged_adapters_are_weights_like_others(folder_of, tmp_path):
    """What the refusal of adapters advises."""
    family, folder = FAMILIES["sd3"], folder_of("sd3")
    lora = random_lora(loaded(folder), tmp_path / "lora")
    pipe = loaded(folder)
    pipe.load_lora_weights(lora)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    mine = Engine(plan_for([], folder, settings(family)), pipe=pipe).generate("a red fox").latents
    want = generate([], folder, {**settings(family), "lora": lora})[0]
    assert (mine - want).abs().max() < 2e-5 * max(1.0, want.abs().max().item())
