"""PipeFusion: serial in warm-up, and past it the same result for every number of stages and every split of the
tokens."""

from __future__ import annotations

import pytest
import torch

from xdit_core import PlanRefused
from xdit_core.testing.runs import diffusers_latents, generate, plan_for


def displaced(folder, **settings):
    """The reference: the same schedule in one process."""
    one = {**{f"pipefusion.{k}": v for k, v in settings.items()}, "pipefusion.stages": 1}
    return generate(["pipefusion"], str(folder), one)[0]


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_warmup_is_bit_equal_to_serial(gloo, tiny_sd3_folder, stages):
    settings = {"pipefusion.stages": stages, "pipefusion.warmup": 4}
    results = gloo.run(generate, ["pipefusion"], str(tiny_sd3_folder), settings, world=stages)
    serial = diffusers_latents(str(tiny_sd3_folder))
    for latents, _ in results:
        assert torch.equal(latents, serial)


@pytest.mark.parametrize(("patches", "warmup"), [(2, 1), (3, 1), (4, 2), (8, 1), (3, 0)])
def test_result_does_not_depend_on_stages(gloo, tiny_sd3_folder, patches, warmup):
    reference = displaced(tiny_sd3_folder, patches=patches, warmup=warmup)
    assert not torch.allclose(reference, diffusers_latents(str(tiny_sd3_folder)), atol=1e-3)
    for stages in (2, 4):
        settings = {"pipefusion.stages": stages, "pipefusion.patches": patches, "pipefusion.warmup": warmup}
        results = gloo.run(generate, ["pipefusion"], str(tiny_sd3_folder), settings, world=stages)
        for latents, _ in results:
            torch.testing.assert_close(latents, reference, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("ulysses", "ring", "stages"), [(2, 1, 2), (1, 2, 2), (2, 2, 2), (4, 1, 2), (2, 2, 1)])
@pytest.mark.parametrize(("patches", "warmup"), [(4, 1), (3, 0)])
def test_with_usp_equals_the_displaced_reference(gloo, tiny_sd3_folder, ulysses, ring, stages, patches, warmup):
    """xDiT 0.7 caches rank-major in warm-up and patch-major after it: its first displaced step fails this."""
    reference = displaced(tiny_sd3_folder, patches=patches, warmup=warmup)
    settings = {"usp.ulysses": ulysses, "usp.ring": ring}
    settings |= {"pipefusion.stages": stages, "pipefusion.patches": patches, "pipefusion.warmup": warmup}
    world = ulysses * ring * stages
    results = gloo.run(generate, ["usp", "pipefusion"], str(tiny_sd3_folder), settings, world=world)
    for latents, _ in results:
        torch.testing.assert_close(latents, reference, atol=2e-5, rtol=1e-5)


def naive_displaced(folder, patches, warmup, steps=4):
    """The schedule written down again without the engine: plain diffusers, one patched forward, a dictionary of keys
    and values."""
    from unittest import mock

    import torch.nn.functional as F
    from diffusers import StableDiffusion3Pipeline

    from xdit_core.parallel.tokens import patch_bounds

    pipe = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    pipe.set_progress_bar_config(disable=True)
    model, attend, cache, step = pipe.transformer, F.scaled_dot_product_attention, {}, [0]

    def forward(hidden_states, timestep, encoder_hidden_states, pooled_projections, **_):
        x = model.pos_embed(hidden_states)
        temb = model.time_text_embed(timestep, pooled_projections)
        text = model.context_embedder(encoder_hidden_states)
        side, words = hidden_states.shape[-1] // 2, text.shape[1]
        rows = patch_bounds(side, side, words, patches)
        whole = step[0] < warmup
        outs, fresh = [], {}
        for m in [0] if whole else range(patches):
            a, b = (0, side) if whole else (rows[m], rows[m + 1])
            h, c = x[:, a * side : b * side], text if m == 0 else text[:, :0]
            for i, block in enumerate(model.transformer_blocks):

                def joint(q, k, v, i=i, m=m, n=h.shape[1], **options):
                    kv = torch.stack((k, v))
                    picture, words_kv = kv[..., :n, :], kv[..., n:, :]
                    if whole:
                        for p in range(patches):
                            cache[i, p] = picture[..., rows[p] * side : rows[p + 1] * side, :]
                    else:
                        cache[i, m] = picture
                    if m == 0:
                        fresh[i] = words_kv
                    known = [cache[i, p] for p in range(patches) if (i, p) in cache]
                    full = torch.cat([*known, fresh[i]], dim=-2)
                    return attend(q, full[0], full[1], **options)

                with mock.patch.object(F, "scaled_dot_product_attention", joint):
                    c, h = block(hidden_states=h, encoder_hidden_states=c, temb=temb, joint_attention_kwargs=None)
            outs.append(h)
        step[0] += 1
        y = model.proj_out(model.norm_out(torch.cat(outs, dim=1), temb))
        y = y.reshape(y.shape[0], side, side, 2, 2, -1)
        return (torch.einsum("nhwpqc->nchpwq", y).reshape(hidden_states.shape),)

    with mock.patch.object(model, "forward", forward):
        return pipe(
            "a red fox",
            num_inference_steps=steps,
            guidance_scale=7.0,
            max_sequence_length=5,
            output_type="latent",
            generator=[torch.Generator().manual_seed(0)],
        )[0]


@pytest.mark.parametrize(("patches", "warmup"), [(2, 1), (4, 2), (3, 0), (8, 1)])
def test_reference_equals_the_schedule_written_down_again(tiny_sd3_folder, patches, warmup):
    mine = displaced(tiny_sd3_folder, patches=patches, warmup=warmup)
    torch.testing.assert_close(mine, naive_displaced(tiny_sd3_folder, patches, warmup), atol=1e-5, rtol=1e-5)


def test_dual_attention_and_odd_sizes(gloo, tmp_path):
    from xdit_core.testing.models import save_tiny_sd3

    folder = save_tiny_sd3(tmp_path / "sd35", dual=(0, 1), layers=3)
    settings = {"pipefusion.patches": 3, "height": 28, "width": 36, "images": 2}
    reference = generate(["pipefusion"], str(folder), {**settings, "pipefusion.stages": 1})[0]
    both = {**settings, "pipefusion.stages": 3, "usp.ulysses": 2}
    results = gloo.run(generate, ["usp", "pipefusion"], str(folder), both, world=6)
    torch.testing.assert_close(results[0][0], reference, atol=1e-5, rtol=1e-5)


def test_explicit_layers(gloo, tiny_sd3_folder):
    reference = displaced(tiny_sd3_folder, patches=2)
    results = gloo.run(
        generate, ["pipefusion"], str(tiny_sd3_folder), {"pipefusion.layers": "1,3", "pipefusion.patches": 2}, world=2
    )
    torch.testing.assert_close(results[0][0], reference, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "scheduler", ["DPMSolverMultistepScheduler", "EulerAncestralDiscreteScheduler", "DDPMScheduler"]
)
def test_schedulers_over_stages(gloo, tiny_pixart_folder, scheduler):
    """Multistep history and noise drawn at every step: bit-equal in warm-up, the same for 2 and 4 stages past it."""
    folder, own = str(tiny_pixart_folder), {"use_resolution_binning": False, "clean_caption": False}
    values = {"model": "pixart_sigma", "scheduler": scheduler, **{f"call.{k}": v for k, v in own.items()}}
    warm = {**values, "pipefusion.stages": 2, "pipefusion.warmup": 4}
    results = gloo.run(generate, ["pipefusion"], folder, warm, world=2)
    assert torch.equal(results[1][0], diffusers_latents(folder, scheduler=scheduler, guidance_scale=4.5, **own))
    late = {**values, "pipefusion.patches": 4, "pipefusion.warmup": 1}
    reference = generate(["pipefusion"], folder, {**late, "pipefusion.stages": 1})[0]
    results = gloo.run(generate, ["pipefusion"], folder, {**late, "pipefusion.stages": 4}, world=4)
    torch.testing.assert_close(results[3][0], reference, atol=1e-4, rtol=1e-4)


def held_blocks(folder, stages):
    """Names of the parameters that this rank holds."""
    from xdit_core import Engine

    engine = Engine(plan_for(["pipefusion"], folder, {"pipefusion.stages": stages}))
    names = [n for n, p in engine.pipe.transformer.named_parameters() if p.device.type != "meta"]
    engine.close()
    return sorted({int(n.split("blocks.")[-1].split(".")[0]) for n in names if "blocks." in n}), len(names)


def test_each_rank_holds_its_own_blocks_only(gloo, tiny_sd3_folder):
    results = gloo.run(held_blocks, str(tiny_sd3_folder), 4, world=4)
    assert [blocks for blocks, _ in results] == [[0], [1], [2], [3]]


def test_bytes_sent_match_the_table(gloo, tiny_sd3_folder):
    """The table counts 2 x tokens x hidden for each rank: what it receives and what it sends on; the first stage only
    sends."""
    settings = {"pipefusion.stages": 3, "pipefusion.patches": 4, "max_sequence_length": 4}
    results = gloo.run(generate, ["pipefusion"], str(tiny_sd3_folder), settings, world=3)
    one = 64 * 32 * 4 * 2 * 4  # tokens x hidden x bytes x batch x steps
    text = (12 + 4) * 32 * 4 * 2 * 4
    latents = 4 * 16 * 16 * 4 * 2 * 4
    assert results[0][1] == {"stages": one, "stages.text": text}
    assert results[1][1] == {"stages": one, "stages.text": text}
    assert results[2][1] == {"latents": latents}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"pipefusion.patches": 0}, "patches=0 does not fit 8 rows of tokens; use 1 to 8"),
        ({"pipefusion.patches": 9}, "patches=9 does not fit 8 rows of tokens; use 1 to 8"),
        ({"pipefusion.warmup": -1}, "warmup=-1 is negative; use 0 or more"),
        ({"pipefusion.warmup": 5}, "warmup=5 is more than steps=4; use a warmup from 0 to 4"),
        ({"pipefusion.stages": 5}, "4 blocks, which does not fit pipefusion.stages=5; use one of 1, 2, 3, 4"),
        ({"pipefusion.layers": "2,3"}, "must be positive numbers that add up to the 4 blocks"),
        ({"pipefusion.layers": "4,0"}, "must be positive numbers that add up to the 4 blocks"),
        ({"pipefusion.layers": "2,2", "pipefusion.stages": 4}, "leave out one of the two"),
    ],
)
def test_what_is_refused(tiny_sd3_folder, settings, sentence):
    with pytest.raises(PlanRefused) as caught:
        plan_for(["pipefusion"], str(tiny_sd3_folder), settings)
    assert sentence in str(caught.value)


def previewed(folder, stages):
    """Steps shown on this rank, and the latents of the run."""
    from xdit_core import Engine, Preview

    settings = {"pipefusion.stages": stages, "pipefusion.patches": 2, "pipefusion.warmup": 2}
    engine, shown = Engine(plan_for(["pipefusion"], folder, settings)), []
    call = {"callback_on_step_end": Preview(lambda step, latents: shown.append((step, latents.clone())))}
    latents = engine.generate("a red fox", call=call).latents.clone()
    engine.close()
    return shown, latents


def test_previews_show_on_the_first_stage_and_change_nothing(gloo, tiny_sd3_folder):
    (first, latents), (second, same) = gloo.run(previewed, str(tiny_sd3_folder), 2, world=2)
    reference, _ = generate(
        ["pipefusion"], str(tiny_sd3_folder), {"pipefusion.patches": 2, "pipefusion.warmup": 2, "pipefusion.stages": 1}
    )
    torch.testing.assert_close(latents, reference, atol=1e-5, rtol=1e-5)
    assert torch.equal(latents, same)
    assert [step for step, _ in first] == [0, 1, 2] and not second
    seen = []

    def look(pipe, step, timestep, values):
        seen.append(values["latents"].clone())
        return values

    diffusers_latents(str(tiny_sd3_folder), callback_on_step_end=look)
    assert torch.equal(first[0][1], seen[0]) and torch.equal(first[1][1], seen[1])  # the warm-up


def read_on_one_rank(folder):
    """A callback that reads the latents on rank 0 alone."""
    import torch.distributed as dist

    from xdit_core import Engine

    settings = {"pipefusion.stages": 2, "pipefusion.warmup": 2, "timeout": 3}
    engine = Engine(plan_for(["pipefusion"], folder, settings))

    def look(pipe, step, timestep, values):
        if dist.get_rank() == 0:
            values["latents"].mean().item()
        return values

    engine.generate("a red fox", call={"callback_on_step_end": look})


def test_reading_latents_on_one_rank_is_an_error_and_no_hang(tiny_sd3_folder):
    from xdit_core.testing.pool import Pool, PoolError

    pool = Pool()  # of its own: these ranks lose each other
    with pytest.raises(
        PoolError, match=r"LazyError: .*were read on this rank, and the others did not join within 1.5 s"
    ):
        pool.run(read_on_one_rank, str(tiny_sd3_folder), world=2, timeout=100)
    pool.close()
