"""Guidance that is there in some steps only, schedulers of second order, inference mode: what ranks evaluate when must
not matter."""

from __future__ import annotations

import pytest
import torch

from helpers.guidance import ASKED, SCHEDULES
from xdit_core import Engine, Message, UnsupportedCall, materialized
from xdit_core.parallel.channel import Channel
from xdit_core.testing import assert_close
from xdit_core.testing.runs import diffusers_latents, generate, plan_for

HEUN = {"scheduler": "FlowMatchHeunDiscreteScheduler"}


def with_schedule(plugins, folder, values, name, inference=False):
    """Latents of a run whose guidance changes on its way."""
    torch.set_num_threads(1)
    engine = Engine(plan_for(plugins, folder, {"steps": 5, **values}))
    engine.pipe._callback_tensor_inputs = (
        ASKED  # SD3 does not name the pooled embeddings, though it uses what comes back
    )
    more = {"callback_on_step_end": SCHEDULES[name], "callback_on_step_end_tensor_inputs": ASKED}
    try:
        with torch.inference_mode(inference):
            return engine.generate("a red fox", call=more).latents.clone()
    finally:
        engine.close()


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("patches", [1, 3])
def test_guidance_that_ends_or_comes_and_goes(gloo, tiny_sd3_folder, name, patches):
    folder = str(tiny_sd3_folder)
    late = {"pipefusion.patches": patches, "pipefusion.warmup": 1}
    want = with_schedule(["pipefusion"], folder, {**late, "pipefusion.stages": 1}, name)
    if patches == 1:
        torch.testing.assert_close(want, with_schedule([], folder, {}, name), rtol=0, atol=0)
    for stages in (1, 2):
        values = {**late, "pipefusion.stages": stages}
        for latents in gloo.run(with_schedule, ["cfg", "pipefusion"], folder, values, name, world=2 * stages):
            assert_close(latents, want)


def test_guidance_that_ends_without_patches(gloo, tiny_sd3_folder):
    want = with_schedule([], str(tiny_sd3_folder), {}, "drop")
    for latents in gloo.run(with_schedule, ["cfg"], str(tiny_sd3_folder), {}, "drop", world=2):
        assert_close(latents, want)


def test_inference_mode(gloo, tiny_sd3_folder):
    """Tensors made in inference mode have no version, so no memory of results may rest on one."""
    folder, late = str(tiny_sd3_folder), {"pipefusion.patches": 3}
    want = with_schedule(["pipefusion"], folder, {**late, "pipefusion.stages": 1}, "drop")
    assert_close(with_schedule(["pipefusion"], folder, {**late, "pipefusion.stages": 1}, "drop", True), want)
    values = {**late, "pipefusion.stages": 2}
    for latents in gloo.run(with_schedule, ["pipefusion"], folder, values, "drop", True, world=2):
        assert_close(latents, want)


@pytest.mark.parametrize("plugins", [["pipefusion"], ["distrifusion"]])
def test_warmup_counts_steps_of_the_pipeline(gloo, tiny_sd3_folder, plugins):
    """A scheduler of second order calls the denoiser twice a step; a run that is all warm-up is a serial run."""
    degree = (
        {"pipefusion.stages": 2, "pipefusion.patches": 3} if plugins == ["pipefusion"] else {"distrifusion.degree": 2}
    )
    values = {**HEUN, **degree, "steps": 3}
    serial = generate([], str(tiny_sd3_folder), {**HEUN, "steps": 3})[0]
    for latents, _ in gloo.run(generate, plugins, str(tiny_sd3_folder), {**values, f"{plugins[0]}.warmup": 3}, world=2):
        assert_close(latents, serial)
    (displaced, _), _ = gloo.run(
        generate, plugins, str(tiny_sd3_folder), {**values, f"{plugins[0]}.warmup": 1}, world=2
    )
    assert (displaced - serial).abs().max() > 1e-3


def one_call(plugins, folder):
    """The denoiser of PixArt, whose prediction has twice the channels of the latents, called by hand with one
    condition."""
    torch.set_num_threads(1)
    engine = Engine(plan_for(plugins, folder, {"model": "pixart_sigma", "steps": 2}))
    noise = torch.Generator().manual_seed(3)
    latents, text = torch.randn(1, 4, 16, 16, generator=noise), torch.randn(1, 6, 16, generator=noise)
    try:
        with torch.no_grad():
            transformer = engine.pipe.transformer
            out = transformer(latents, encoder_hidden_states=text, timestep=torch.tensor([7]), added_cond_kwargs={})
        return materialized(out.sample)
    finally:
        engine.close()


def test_a_prediction_of_another_shape_than_the_latents(gloo, tiny_pixart_folder):
    want = one_call([], str(tiny_pixart_folder))
    assert want.shape == (1, 8, 16, 16)
    for out in gloo.run(one_call, ["cfg"], str(tiny_pixart_folder), world=2):
        assert_close(out, want)


@pytest.mark.parametrize(
    ("part", "said"),
    [("norm_out", "the head of transformer mixes rows"), ("pos_embed", "the embedding of the latents mixes rows")],
)
def test_a_denoiser_whose_ends_mix_rows_is_refused(tiny_sd3_folder, part, said):
    """Patches are computed with nothing true beside them, so embedding and head must look at each row alone."""
    engine = Engine(plan_for(["pipefusion"], str(tiny_sd3_folder), {"pipefusion.stages": 1, "pipefusion.patches": 2}))
    module = getattr(engine.pipe.transformer, part)
    plain = module.forward

    def mixing(x, *rest):
        out = plain(x, *rest)
        return out - out.mean(dim=1, keepdim=True)

    module.forward = mixing
    with pytest.raises(UnsupportedCall, match=said):
        engine.generate("a red fox")
    engine.close()


def test_a_module_that_is_used_twice_gives_both_results(tiny_sd3_folder):
    """What patches share is computed once for all of them, each use for itself."""
    want = generate(["pipefusion"], str(tiny_sd3_folder), {"pipefusion.stages": 1, "pipefusion.patches": 3})[0]
    plan = plan_for(["pipefusion"], str(tiny_sd3_folder), {"pipefusion.stages": 1, "pipefusion.patches": 3})
    engine = Engine(plan)
    embed = engine.pipe.transformer.time_text_embed
    memoized = embed.forward
    embed.forward = lambda time, pooled: (memoized(2 * time, pooled), memoized(time, pooled))[1]
    torch.testing.assert_close(engine.generate("a red fox").latents, want, rtol=0, atol=0)
    engine.close()


def test_every_message_has_a_number_of_its_own(tiny_sd3_folder):
    engine = Engine(plan_for(["pipefusion"], str(tiny_sd3_folder), {"pipefusion.stages": 1, "pipefusion.patches": 3}))
    channel = Channel(engine.rank, None, "stages")
    names = [Message(call, patch, part) for call in range(50) for patch in (None, 0, 1, 2) for part in range(5)]
    assert len({channel.tag(name) for name in names}) == len(names)
    engine.close()


def test_diffusers_agrees_with_a_run_of_second_order(tiny_sd3_folder):
    """The oracle of the tests above, itself compared."""
    from diffusers import FlowMatchHeunDiscreteScheduler, StableDiffusion3Pipeline

    pipe = StableDiffusion3Pipeline.from_pretrained(tiny_sd3_folder, text_encoder_3=None, tokenizer_3=None)
    pipe.scheduler = FlowMatchHeunDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(0)]
    arguments = {"num_inference_steps": 3, "guidance_scale": 7.0, "max_sequence_length": 5, "output_type": "latent"}
    theirs = pipe("a red fox", generator=generator, **arguments)[0]
    assert torch.equal(generate([], str(tiny_sd3_folder), {**HEUN, "steps": 3})[0], theirs)
    assert not torch.equal(theirs, diffusers_latents(str(tiny_sd3_folder)))
