"""DistriFusion: serial in warm-up, and past it the same as its schedule in one process, for every degree."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from xdit_core import PlanRefused
from xdit_core.parallel.tokens import patch_bounds
from xdit_core.testing.runs import diffusers_latents, generate, plan_for


def displaced(folder, patches, **settings):
    """The reference: the same schedule in one process."""
    one = {"distrifusion.degree": 1, "distrifusion.patches": patches, **settings}
    return generate(["distrifusion"], str(folder), one)[0]


@pytest.mark.parametrize("degree", [2, 3, 4])
def test_warmup_equals_serial(gloo, tiny_sd3_folder, degree):
    settings = {"distrifusion.degree": degree, "distrifusion.warmup": 4}
    serial = diffusers_latents(str(tiny_sd3_folder))
    for latents, _ in gloo.run(generate, ["distrifusion"], str(tiny_sd3_folder), settings, world=degree):
        torch.testing.assert_close(latents, serial, atol=1e-5, rtol=1e-5)
    assert torch.equal(displaced(tiny_sd3_folder, degree, **{"distrifusion.warmup": 4}), serial)


@pytest.mark.parametrize(("degree", "warmup"), [(2, 1), (3, 1), (4, 2), (4, 0), (8, 1)])
def test_equals_its_reference(gloo, tiny_sd3_folder, degree, warmup):
    reference = displaced(tiny_sd3_folder, degree, **{"distrifusion.warmup": warmup})
    assert not torch.allclose(reference, diffusers_latents(str(tiny_sd3_folder)), atol=1e-3)
    settings = {"distrifusion.degree": degree, "distrifusion.warmup": warmup}
    for latents, _ in gloo.run(generate, ["distrifusion"], str(tiny_sd3_folder), settings, world=degree):
        torch.testing.assert_close(latents, reference, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(("ulysses", "ring"), [(2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("warmup", [0, 1])
def test_with_usp(gloo, tiny_sd3_folder, ulysses, ring, warmup):
    more = {"height": 36, "width": 28, "distrifusion.warmup": warmup}
    reference = displaced(tiny_sd3_folder, 2, **more)
    settings = {"distrifusion.degree": 2, "usp.ulysses": ulysses, "usp.ring": ring, **more}
    results = gloo.run(generate, ["distrifusion", "usp"], str(tiny_sd3_folder), settings, world=2 * ulysses * ring)
    for latents, _ in results:
        torch.testing.assert_close(latents, reference, atol=2e-5, rtol=1e-5)


def written_again(folder, patches, warmup):
    """The schedule without the engine: plain diffusers, one patched forward, two dictionaries of keys and values."""
    from diffusers import StableDiffusion3Pipeline

    pipe = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    pipe.set_progress_bar_config(disable=True)
    model, attend, step, before = pipe.transformer, F.scaled_dot_product_attention, [0], {}

    def forward(hidden_states, timestep, encoder_hidden_states, pooled_projections, **_):
        x, temb = model.pos_embed(hidden_states), model.time_text_embed(timestep, pooled_projections)
        text, side = model.context_embedder(encoder_hidden_states), hidden_states.shape[-1] // 2
        rows = patch_bounds(side, side, text.shape[1], patches)
        whole, outs, now = step[0] < warmup, [], {}
        for m in [None] if whole else range(patches):
            h = x if whole else x[:, rows[m] * side : rows[m + 1] * side]
            c = text if whole or m == 0 else text[:, :0]
            for i, block in enumerate(model.transformer_blocks):

                def joint(q, k, v, i=i, m=m, n=h.shape[1], **options):
                    kv = torch.stack((k, v))
                    if whole:
                        for p in range(patches):
                            own = kv[..., rows[p] * side : rows[p + 1] * side, :]
                            now[i, p] = own if p else torch.cat((own, kv[..., n:, :]), dim=-2)
                        return attend(q, k, v, **options)
                    now[i, m] = kv
                    others = [before[i, p] for p in range(patches) if p != m and (i, p) in before]
                    full = torch.cat([kv, *others], dim=-2)
                    return attend(q, full[0], full[1], **options)

                with mock.patch.object(F, "scaled_dot_product_attention", joint):
                    c, h = block(hidden_states=h, encoder_hidden_states=c, temb=temb, joint_attention_kwargs=None)
            outs.append(h)
        before.update(now)
        step[0] += 1
        y = model.proj_out(model.norm_out(torch.cat(outs, dim=1), temb)).reshape(x.shape[0], side, side, 2, 2, -1)
        return (torch.einsum("nhwpqc->nchpwq", y).reshape(hidden_states.shape),)

    with mock.patch.object(model, "forward", forward):
        return pipe(
            "a red fox",
            num_inference_steps=4,
            guidance_scale=7.0,
            max_sequence_length=5,
            output_type="latent",
            generator=[torch.Generator().manual_seed(0)],
        )[0]


@pytest.mark.parametrize(("patches", "warmup"), [(2, 1), (3, 0), (4, 2)])
def test_reference_equals_the_schedule_written_down_again(tiny_sd3_folder, patches, warmup):
    mine = displaced(tiny_sd3_folder, patches, **{"distrifusion.warmup": warmup})
    torch.testing.assert_close(mine, written_again(str(tiny_sd3_folder), patches, warmup), atol=1e-5, rtol=1e-5)


def test_bytes_sent_match_the_table(gloo, tiny_sd3_folder):
    """2 of tokens x hidden x layers, of which the own part stays at home; all ranks together send it to all others."""
    results = gloo.run(generate, ["distrifusion"], str(tiny_sd3_folder), {"distrifusion.degree": 4}, world=4)
    rows, hidden, layers, steps, batch = 64 + 12 + 5, 32, 4, 4, 2
    assert sum(sent["distrifusion"] for _, sent in results) == 2 * rows * hidden * layers * steps * batch * 4 * 3


@pytest.mark.parametrize(
    ("plugins", "settings", "sentence"),
    [
        (
            ["distrifusion"],
            {"distrifusion.degree": 9},
            "picture has 8 rows of tokens, which does not fit distrifusion.degree=9",
        ),
        (["distrifusion"], {"distrifusion.warmup": -1}, "warmup=-1 is negative"),
        (["distrifusion"], {"distrifusion.warmup": 5}, "warmup=5 is more than steps=4"),
        (["distrifusion"], {"distrifusion.degree": 2, "distrifusion.patches": 4}, "every rank has one patch"),
        (["distrifusion", "pipefusion"], {}, "distrifusion and pipefusion both need the slot 'patches'"),
    ],
)
def test_what_is_refused(tiny_sd3_folder, plugins, settings, sentence):
    with pytest.raises(PlanRefused) as caught:
        plan_for(plugins, str(tiny_sd3_folder), settings)
    assert sentence in str(caught.value)
