"""CFG parallelism: the two halves of guidance on two ranks give what one rank gives."""

from __future__ import annotations

import pytest

from xdit_core import Engine, PlanRefused
from xdit_core.testing import assert_close
from xdit_core.testing.runs import diffusers_latents, generate, plan_for

SKIP = {"skip_guidance_layers": [0, 2], "skip_layer_guidance_start": -1.0, "skip_layer_guidance_stop": 1.0}


@pytest.mark.parametrize("changes", [{}, {"images": 3}, {"negative": "blue heart"}, {"height": 36, "width": 28}])
def test_equals_serial(check_plan, changes):
    check_plan(["cfg"], changes, world=2)


def test_a_mask_and_cross_attention(check_plan, tiny_pixart_folder):
    settings = {"model": "pixart_sigma", "call.use_resolution_binning": False, "call.clean_caption": False}
    check_plan(["cfg"], settings, world=2, folder=tiny_pixart_folder)


@pytest.mark.parametrize("plugins", [["cfg"], ["cfg", "pipefusion"]])
def test_a_call_with_one_condition_goes_to_one_rank(gloo, tiny_sd3_folder, plugins):
    """Skip-layer guidance calls the transformer a second time with the prompt alone: the other rank gets that result
    lazily."""
    late = {"pipefusion.patches": 3} if len(plugins) > 1 else {}
    stages = {"pipefusion.stages": 2} if late else {}
    changes = {"call": SKIP}
    serial = generate(
        plugins[1:], str(tiny_sd3_folder), {**late, **({"pipefusion.stages": 1} if late else {})}, "a red fox", changes
    )[0]
    arguments = (plugins, str(tiny_sd3_folder), {**late, **stages}, "a red fox", changes)
    for latents, _ in gloo.run(generate, *arguments, world=4 if late else 2):
        assert_close(latents, serial)


def counted(folder):
    """Calls of the blocks with one condition on this rank, under skip-layer guidance."""
    engine, calls = (
        Engine(plan_for(["cfg", "pipefusion"], folder, {"pipefusion.stages": 1, "pipefusion.patches": 1})),
        [],
    )
    engine.trunks[0].register_forward_hook(lambda module, args, kwargs, out: calls.append(1), with_kwargs=True)
    engine.generate("a red fox", call=SKIP)
    engine.close()
    return len(calls)


def test_separate_calls_are_computed_once_over_both_ranks(gloo, tiny_sd3_folder):
    """4 steps of batched guidance on each rank, and 4 more calls of which the second rank does all."""
    assert gloo.run(counted, str(tiny_sd3_folder), world=2) == [4, 8]


@pytest.mark.parametrize(("patches", "warmup"), [(2, 1), (3, 0)])
def test_with_pipefusion_equals_the_displaced_reference(check_plan, patches, warmup):
    late = {"pipefusion.patches": patches, "pipefusion.warmup": warmup, "images": 2}
    for stages in (1, 2, 4):
        check_plan(["cfg", "pipefusion"], {**late, "pipefusion.stages": stages}, world=2 * stages)


def test_only_the_prediction_is_exchanged(check_plan):
    sent = {"cfg": 4 * 16 * 16 * 4 * 4}  # channels x rows x columns x bytes x steps
    assert check_plan(["cfg"], world=2) == [sent] * 2


def test_without_guidance_it_is_refused(tiny_sd3_folder):
    with pytest.raises(
        PlanRefused, match=r"guidance=1.0 makes sd3 predict once a step.*raise guidance above 1, or drop cfg"
    ):
        plan_for(["cfg"], str(tiny_sd3_folder), {"guidance": 1.0})


def refused_then_drawn(folder):
    """A request without guidance, and one with it."""
    engine = Engine(plan_for(["cfg"], folder))
    try:
        with pytest.raises(PlanRefused, match="leaves nothing for the second rank of cfg"):
            engine.generate("a red fox", guidance=1.0)
        return engine.generate("a red fox").latents
    finally:
        engine.close()


def test_a_request_without_guidance_is_refused_like_a_plan(gloo, tiny_sd3_folder):
    for latents in gloo.run(refused_then_drawn, str(tiny_sd3_folder), world=2):
        assert_close(latents, diffusers_latents(str(tiny_sd3_folder)))
