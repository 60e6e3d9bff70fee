"""What a request may ask passes the checks of a plan; what is refused leaves the engine as it was."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from xdit_core import Engine, PlanRefused, UsageError, XditError, make_plan
from xdit_core.settings import RunSettings, build
from xdit_core.testing.runs import diffusers_latents, generate, plan_for

DIT = {"model": "dit", "steps": 2}


@pytest.fixture(scope="module")
def engine(tiny_sd3_folder):
    """Serial, of SD3."""
    return Engine(plan_for([], str(tiny_sd3_folder), {"steps": 2}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": 0}, "steps=0 is too small; give 1 or more"),
        ({"steps": True}, "steps=True is not a whole number"),
        ({"steps": "many"}, "steps=many is not a whole number"),
        ({"steps": 10**9}, "steps=1000000000 is too large; give 100000 or less"),
        ({"images": 10**9}, "images=1000000000 is too large"),
        ({"frames": 5}, "frames=5: sd3 makes pictures"),
        ({"height": 33}, "height=33 is not a multiple of 4"),
        ({"width": 10**7}, "width=10000000 is too large"),
        ({"seed": 2**70}, "does not fit into 64 bits"),
        ({"seed": "1..x"}, "seed=x is not a whole number"),
        ({"output_type": "np"}, "output_type=np is unknown; use image or latent"),
        ({"call": {"num_inference_steps": 3}}, "call.num_inference_steps is decided by xdit; write steps= instead"),
        ({"call": {"prompt": "x"}}, "call.prompt is decided by xdit; write prompt= instead"),
        ({"call": {"generator": None}}, "call.generator is decided by xdit; write seed= instead"),
        ({"call": {"output_type": "np"}}, "call.output_type is decided by xdit; write output_type= instead"),
        ({"call": {"guidance_scale": 1.0}}, "call.guidance_scale is decided by xdit; write guidance= instead"),
        ({"call": {"self": 1}}, "call.self: StableDiffusion3Pipeline has no such argument"),
        ({"call": {"clip_skp": 1}}, "has no such argument; did you mean clip_skip"),
        ({"call": {"latents": torch.zeros(3, 4, 8, 8)}}, "must be a tensor of the noise of 1 pictures"),
        ({"call": "x"}, "call=x is not a mapping"),
        ({"model": "emoji"}, "generate does not take model"),
        ({"scheduler": "DDIMScheduler"}, "DDIMScheduler"),
        ({"scheduler": "NoScheduler"}, "NoScheduler"),
    ],
)
def test_a_sentence_and_the_engine_goes_on(engine, changes, said):
    with pytest.raises(XditError) as refused:
        engine.generate("a red fox", **changes)
    assert said in str(refused.value)
    assert engine.generate("a red fox", steps="1").latents.shape == (1, 4, 16, 16)


@pytest.mark.parametrize("name", ["FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler"])
def test_a_scheduler_for_one_request(engine, tiny_sd3_folder, name):
    """It is that of an engine whose plan names it, and the next request has the engine's own again."""
    before = engine.generate("a red fox", seed=3).latents
    other = engine.generate("a red fox", seed=3, scheduler=name).latents
    assert torch.equal(engine.generate("a red fox", seed=3).latents, before)
    with Engine(plan_for([], str(tiny_sd3_folder), {"steps": 2, "scheduler": name})) as fresh:
        assert torch.equal(fresh.generate("a red fox", seed=3).latents, other)
        assert torch.equal(
            fresh.generate("a red fox", seed=3, scheduler="FlowMatchEulerDiscreteScheduler").latents, before
        )
    assert not torch.equal(before, other)


@pytest.mark.parametrize("prompt", [None, 5, ["a red fox", None]])
def test_no_prompt(engine, prompt):
    with pytest.raises(UsageError, match="give either a prompt"):
        engine.generate_all([prompt] if not isinstance(prompt, list) else prompt)


def test_what_a_model_does_not_take(tmp_path):
    from helpers.models.tiny import saved

    engine = Engine(
        make_plan([], {**DIT, "model.path": saved("dit", tmp_path / "dit"), "device": "cpu", "output_type": "latent"})
    )
    for changes, said in (
        ({"negative": "x"}, "dit does not take negative=x"),
        ({"max_sequence_length": 3}, "dit does not take max_sequence_length=3"),
        ({"height": 64}, "height=64"),
        ({"frames": 3}, "dit makes pictures"),
    ):
        with pytest.raises(PlanRefused, match=said):
            engine.generate("golden retriever", **changes)
    with pytest.raises(PlanRefused, match="nothing in particular"):
        engine.generate("nothing in particular")
    assert engine.generate("golden retriever").latents.isfinite().all()


def test_latents_of_several_pictures(gloo, tiny_sd3_folder):
    noise = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(9))
    want = diffusers_latents(str(tiny_sd3_folder), num_images_per_prompt=3, latents=noise)
    changes = {"images": 3, "call": {"latents": noise}}
    for latents, _ in gloo.run(generate, ["dp"], str(tiny_sd3_folder), {"dp.degree": 2}, "a red fox", changes, world=2):
        torch.testing.assert_close(latents, want, rtol=0, atol=5e-5)


@pytest.mark.parametrize("plugins", [["dp"], ["cfg"], ["usp"], ["pipefusion"]])
def test_embeddings_in_place_of_a_prompt(gloo, tiny_sd3_folder, plugins):
    from diffusers import StableDiffusion3Pipeline

    pipe = StableDiffusion3Pipeline.from_pretrained(tiny_sd3_folder, text_encoder_3=None, tokenizer_3=None)
    with torch.no_grad():
        texts = pipe.encode_prompt("a red fox", None, None, device="cpu", max_sequence_length=5)
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    values = {"dp": {"dp.degree": 2}, "pipefusion": {"pipefusion.stages": 2, "pipefusion.patches": 1}}.get(
        plugins[0], {}
    )
    values |= {"usp.ulysses": 2, "usp.ring": 1} if plugins == ["usp"] else {}
    changes = {"images": 2, "call": dict(zip(names, texts, strict=True))}
    want = diffusers_latents(str(tiny_sd3_folder), num_images_per_prompt=2)
    for latents, _ in gloo.run(generate, plugins, str(tiny_sd3_folder), values, None, changes, world=2):
        torch.testing.assert_close(latents, want, rtol=0, atol=5e-5)


def test_numbers_that_are_none(tiny_sd3_folder):
    engine = Engine(plan_for([], str(tiny_sd3_folder), {"steps": 2}))
    first = engine.generate("a red fox").latents
    weight = engine.pipe.transformer.proj_out.weight.data
    weight[0, 0] += torch.inf
    for output_type in ("latent", "image"):
        with pytest.raises(
            XditError, match=r"the latents came out as not a number or infinite in float32.*another scheduler"
        ):
            engine.generate("a red fox", output_type=output_type)
    assert first.isfinite().all()


def test_a_vae_that_overflows(tiny_sd3_folder):
    engine = Engine(plan_for([], str(tiny_sd3_folder), {"steps": 2, "output_type": "image"}))
    engine.pipe.vae.decoder.conv_out.bias.data += torch.nan
    with pytest.raises(XditError, match="the decoded picture came out as not a number"):
        engine.generate("a red fox")


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize(
    ("plugins", "values"),
    [
        ([], {}),
        (["pipefusion"], {"pipefusion.stages": 1, "pipefusion.patches": 2}),
        (["distrifusion"], {"distrifusion.degree": 1, "distrifusion.patches": 2}),
        (["compile"], {"compile.backend": "eager"}),
    ],
)
def test_nothing_of_a_request_outlives_it(tiny_sd3_folder, plugins, values, fails):
    """Latents and embeddings are another user's data."""
    engine = Engine(plan_for(plugins, str(tiny_sd3_folder), {"steps": 2, **values}))
    alive = []

    def remember(pipe, step, timestep, tensors):
        alive.extend(weakref.ref(x) for x in tensors.values())
        if fails and step == 1:
            raise RuntimeError("enough")
        return {}

    more = {"callback_on_step_end": remember, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    try:
        engine.generate("a red fox", call=more)
    except RuntimeError as error:
        error.__traceback__ = None
    assert len(alive) == 4
    gc.collect()
    assert [x.shape for x in (ref() for ref in alive) if x is not None] == []
    size = 16 * 16 * 4
    held = [
        x
        for x in gc.get_objects()
        if isinstance(x, torch.Tensor) and x.numel() == size and not isinstance(x, torch.nn.Parameter)
    ]
    assert held == []


@pytest.mark.parametrize(
    ("text", "seeds", "of_third"),
    [
        ("5", (5,), 7),
        (5, (5,), 7),
        ("1..4", (1, 2, 3, 4), 3),
        ("3,9,4", (3, 9, 4), 4),
        ([3, 9, 4], (3, 9, 4), 4),
        ("1..2,7", (1, 2, 7), 7),
        ("-3", (-3,), -1),
    ],
)
def test_seeds(text, seeds, of_third):
    run = build(RunSettings, "", {"seed": text})
    assert run.seed == seeds and run.seed_of(2) == of_third


def test_a_seed_for_each_picture(tiny_sd3_folder):
    folder = str(tiny_sd3_folder)
    plan = plan_for([], folder, {"seed": "3,9", "steps": 2})
    assert plan.run.images == 2
    both = Engine(plan).generate("a red fox").latents
    for i, seed in enumerate((3, 9)):
        torch.testing.assert_close(
            both[i : i + 1], generate([], folder, {"seed": seed, "steps": 2})[0], rtol=0, atol=5e-5
        )
    with pytest.raises(PlanRefused, match="seed= names 2 seeds for images=3"):
        plan_for([], folder, {"seed": "3,9", "images": 3})


def test_a_random_seed_is_a_number_that_is_told(tiny_sd3_folder):
    plans = [plan_for([], str(tiny_sd3_folder), {"seed": "random"}) for _ in range(2)]
    assert plans[0].run.seed != plans[1].run.seed
    assert plans[0].values["seed"] == plans[0].run.seed[0]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"threads": 100000}, "threads=100000 is too large; give 4096 or less"),
        ({"nproc": 10**6}, "nproc=1000000 is too large"),
        ({"timeout": 1e300}, "timeout=1e+300 is too large"),
        ({"call.num_inference_steps": "3", "steps": 20}, "write steps= instead"),
        ({"call.clip_skip": "x"}, "call.clip_skip=x is not a whole number, as StableDiffusion3Pipeline takes it"),
        ({"call.callback_on_step_end": "x"}, "is not something that can be written on a command line"),
    ],
)
def test_a_plan_says_the_same(tiny_sd3_folder, settings, said):
    with pytest.raises(PlanRefused) as refused:
        plan_for([], str(tiny_sd3_folder), settings)
    assert said in str(refused.value)


def test_huge_degrees(tiny_sd3_folder):
    with pytest.raises(PlanRefused, match=r"usp.ring=1000000000000 need.*lower them to at most 65536"):
        plan_for(["usp"], str(tiny_sd3_folder), {"usp.ring": 10**12})


def test_words_of_a_command_line_become_what_the_pipeline_takes(tmp_path):
    from xdit_core.testing.models import save_tiny_pixart

    folder = save_tiny_pixart(tmp_path / "pixart")
    words = {
        "call.clean_caption": "no",
        "call.use_resolution_binning": "off",
        "call.eta": "1",
        "call.timesteps": "[900, 500]",
    }
    plan = make_plan([], {"model": "pixart_sigma", "model.path": str(folder), "device": "cpu", **words})
    assert plan.call == {"clean_caption": False, "use_resolution_binning": False, "eta": 1, "timesteps": [900, 500]}
    assert plan_for([], str(folder), {"model": "pixart_sigma", "call.clean_caption": True}).call == {
        "clean_caption": True
    }


def test_ranks_without_a_picture_are_noted(tiny_sd3_folder):
    plan = plan_for(["dp"], str(tiny_sd3_folder), {"dp.degree": 4, "images": 2})
    assert any("dp.degree=4 for 2 pictures: the other ranks have nothing to draw" in note for note in plan.notes)
