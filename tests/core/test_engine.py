"""The engine: nothing but plain calls on the hot path, several engines side by side, calls it cannot honour."""

from __future__ import annotations

import json

import pytest
import torch

from xdit_core import (
    Engine,
    GuardError,
    ModelError,
    Observer,
    PlanRefused,
    PluginError,
    Registry,
    UnsupportedCall,
    UsageError,
    XditError,
)
from xdit_core.testing.runs import diffusers_latents, generate, plan_for

ONE = {"pipefusion.stages": 1, "pipefusion.patches": 3}


def test_without_a_plugin_it_is_diffusers(tiny_sd3_folder):
    for changes in ({}, {"guidance": 1.0}, {"images": 2}):
        latents, sent = generate([], str(tiny_sd3_folder), changes)
        names = {"guidance": "guidance_scale", "images": "num_images_per_prompt"}
        assert torch.equal(
            latents, diffusers_latents(str(tiny_sd3_folder), **{names[k]: v for k, v in changes.items()})
        )
        assert not sent


def test_the_hot_path_calls_no_hook(tiny_sd3_folder):
    registry = Registry()

    def alarm(name, methods, kwargs):
        raise RuntimeError(f"hook {name} was called")

    class Begun(Observer):
        def job_started(self, job):
            """A request is checked like a plan, with hooks; from here on it is drawn."""
            registry.manager.add_hookcall_monitoring(alarm, lambda *_: None)

    plan = plan_for(["usp", "pipefusion"], str(tiny_sd3_folder), {**ONE, "usp.ulysses": 1, "usp.ring": 1})
    engine = Engine(plan, registry, observer=Begun())
    assert len(engine.generate_all(["a red fox"], output_type="image")[0].images) == 1
    with pytest.raises(PluginError, match="hook xdit_settings was called"):
        registry.call("xdit_settings", {"usp": {}})


def test_two_engines_with_different_plans(tiny_sd3_folder):
    folder = str(tiny_sd3_folder)
    serial, lazy = Engine(plan_for([], folder)), Engine(plan_for(["pipefusion"], folder, ONE))
    a, b = serial.generate("a red fox").latents, lazy.generate("a red fox").latents
    assert not torch.allclose(a, b, atol=1e-3)
    assert torch.equal(serial.generate("a red fox").latents, a) and torch.equal(lazy.generate("a red fox").latents, b)


def test_requests_of_different_sizes_in_turn(tiny_sd3_folder):
    engine = Engine(plan_for(["pipefusion"], str(tiny_sd3_folder), ONE))
    first = engine.generate("a red fox").latents
    other = engine.generate("a red fox", height=20, width=44, images=2, steps=3).latents
    assert other.shape == (2, 4, 10, 22)
    assert torch.equal(engine.generate("a red fox").latents, first)


def test_a_failed_request_leaves_nothing_behind(tiny_sd3_folder):
    engine = Engine(plan_for(["pipefusion"], str(tiny_sd3_folder), ONE))
    first = engine.generate("a red fox").latents

    def stop(pipe, i, t, values):
        if i == 1:
            raise KeyError("stop")
        return values

    with pytest.raises(KeyError):
        engine.generate("a red fox", call={"callback_on_step_end": stop})
    assert torch.equal(engine.generate("a red fox").latents, first)


def test_a_callback_may_read_the_latents(tiny_sd3_folder):
    seen = []

    def look(pipe, i, t, values):
        seen.append(values["latents"].mean().item())
        return values

    folder = str(tiny_sd3_folder)
    engine = Engine(plan_for(["pipefusion"], folder, ONE))
    plain = engine.generate("a red fox").latents
    assert torch.equal(engine.generate("a red fox", call={"callback_on_step_end": look}).latents, plain)
    assert len(seen) == 4 and len(set(seen)) == 4


@pytest.mark.parametrize("plugins", [[], ["pipefusion"]])
def test_skip_layer_guidance_is_honoured(tiny_sd3_folder, plugins):
    """A second call of the transformer in some steps, with blocks left out: a branch of its own."""
    call = {"skip_guidance_layers": [0, 2], "skip_layer_guidance_start": -1.0, "skip_layer_guidance_stop": 1.0}
    settings = {"pipefusion.stages": 1, "pipefusion.patches": 2, "pipefusion.warmup": 4} if plugins else {}
    latents, _ = generate(plugins, str(tiny_sd3_folder), settings, changes={"call": call})
    serial = diffusers_latents(str(tiny_sd3_folder), **call)
    assert torch.equal(latents, serial)
    assert not torch.allclose(serial, diffusers_latents(str(tiny_sd3_folder)), atol=1e-3)


def test_skip_layer_guidance_over_stages(gloo, tiny_sd3_folder):
    call = {"skip_guidance_layers": [0, 2], "skip_layer_guidance_start": -1.0, "skip_layer_guidance_stop": 1.0}
    late = {"pipefusion.patches": 3, "pipefusion.warmup": 1}
    reference = generate(
        ["pipefusion"], str(tiny_sd3_folder), {**late, "pipefusion.stages": 1}, "a red fox", {"call": call}
    )
    arguments = ["pipefusion"], str(tiny_sd3_folder), {**late, "pipefusion.stages": 2}, "a red fox", {"call": call}
    results = gloo.run(generate, *arguments, world=2)
    torch.testing.assert_close(results[1][0], reference[0], atol=1e-5, rtol=1e-5)


def test_controlnet_residuals_are_refused(tiny_sd3_folder):
    engine = Engine(plan_for(["pipefusion"], str(tiny_sd3_folder), ONE))
    x = torch.zeros(1, 4, 16, 16)
    with pytest.raises(UnsupportedCall, match=r"block_controlnet_hidden_states=\.\.\.\) cannot be honoured"):
        engine.pipe.transformer(hidden_states=x, block_controlnet_hidden_states=[x])


def test_the_guard_sees_an_attention_that_went_elsewhere(tiny_sd3_folder):
    engine = Engine(plan_for(["pipefusion"], str(tiny_sd3_folder), ONE))

    class Own:
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_):
            return hidden_states, encoder_hidden_states

    list(engine.trunks[0].blocks.values())[2].attn.set_processor(Own())
    with pytest.raises(
        GuardError, match="block 2 made 0 attention calls through the engine where the adapter declares 1"
    ):
        engine.generate("a red fox")


def test_unknown_arguments_of_generate(tiny_sd3_folder):
    with pytest.raises(UsageError, match="generate does not take stpes; it takes frames, guidance, height"):
        Engine(plan_for([], str(tiny_sd3_folder))).generate("x", stpes=3)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [({"height": 30}, PlanRefused), ({"steps": 0}, PlanRefused), ({"dtype": "float16"}, UsageError)],
)
def test_requests_are_checked_like_plans(tiny_sd3_folder, changes, kind):
    with pytest.raises(kind):
        Engine(plan_for([], str(tiny_sd3_folder))).generate("x", **changes)


def test_a_request_too_small_for_its_patches(tiny_sd3_folder):
    engine = Engine(plan_for(["pipefusion"], str(tiny_sd3_folder), ONE))
    with pytest.raises(PlanRefused, match=r"pipefusion.patches=3 does not fit 2 rows of tokens; use 1 to 2"):
        engine.generate("a red fox", height=8)


def test_an_engine_for_more_ranks_than_there_are(tiny_sd3_folder):
    with pytest.raises(
        UsageError, match="the plan needs 2 ranks and this process belongs to no group; start it with xdit-launch"
    ):
        Engine(plan_for(["usp"], str(tiny_sd3_folder), {"usp.ulysses": 2}))


def fails_then_asks_again(folder):
    """On two ranks: a request that fails, then another."""
    engine = Engine(plan_for(["pipefusion"], folder, {"pipefusion.stages": 2}))

    def stop(pipe, i, t, values):
        raise KeyError("stop")

    with pytest.raises(KeyError):
        engine.generate("a red fox", call={"callback_on_step_end": stop})
    with pytest.raises(XditError, match="an earlier request failed, and the ranks no longer agree"):
        engine.generate("a red fox")


def test_after_a_failure_on_several_ranks_an_engine_refuses(gloo, tiny_sd3_folder):
    gloo.run(fails_then_asks_again, str(tiny_sd3_folder), world=2)


def test_variants_beside_the_weights_are_left_alone(tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    from xdit_core.testing.models import save_tiny_sd3

    folder = save_tiny_sd3(tmp_path / "m")
    before, _ = generate([], str(folder))
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file(
        {k: torch.zeros_like(v) for k, v in load_file(file).items()},
        file.with_name("diffusion_pytorch_model.fp16.safetensors"),
    )
    shutil.copy(file, file.with_name("zzz.safetensors"))
    assert torch.equal(generate([], str(folder))[0], before)


def test_sharded_weights(tmp_path):
    from xdit_core.testing.models import tiny_sd3

    pipe = tiny_sd3()
    pipe.save_pretrained(tmp_path / "one")
    pipe.save_pretrained(tmp_path / "many", max_shard_size="60KB")
    assert len(list((tmp_path / "many" / "transformer").glob("*.safetensors"))) > 1
    settings = {"pipefusion.stages": 1, "pipefusion.patches": 2}
    assert torch.equal(*(generate(["pipefusion"], str(tmp_path / n), settings)[0] for n in ("one", "many")))


def test_blocks_compile_whole(tiny_sd3_folder):
    """The attention of a compiled block is one op; eager and compiled agree."""
    torch._dynamo.reset()  # variants of other tests count towards the compiler's limit
    folder = str(tiny_sd3_folder)
    plain = Engine(plan_for(["pipefusion"], folder, ONE)).generate("a red fox").latents
    engine = Engine(plan_for(["pipefusion"], folder, ONE))
    for block in engine.trunks[0].blocks.values():
        block.compile(fullgraph=True, backend="eager")
    torch.testing.assert_close(engine.generate("a red fox").latents, plain, atol=1e-5, rtol=1e-5)


def test_components_that_are_listed_as_null_or_missing(tmp_path):
    from xdit_core.testing.models import save_tiny_sd3

    folder = save_tiny_sd3(tmp_path / "m")
    index = json.loads((folder / "model_index.json").read_text())
    index["text_encoder_3"], index["tokenizer_3"] = [None, None], [None, None]
    (folder / "model_index.json").write_text(json.dumps(index))
    nulls, _ = generate([], str(folder))
    for name in ("text_encoder_3", "tokenizer_3", "image_encoder", "feature_extractor"):
        index.pop(name, None)
    (folder / "model_index.json").write_text(json.dumps(index))
    assert torch.equal(generate([], str(folder))[0], nulls)


def test_weights_of_another_model(tmp_path):
    from safetensors.torch import save_file

    from xdit_core.testing.models import save_tiny_sd3

    folder = save_tiny_sd3(tmp_path / "m")
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({f"other.{i}": torch.zeros(3) for i in range(9)}, file)
    with pytest.raises(ModelError, match="lacks"):
        Engine(plan_for(["pipefusion"], str(folder), {"pipefusion.stages": 1}))


def test_memory_does_not_grow(tiny_sd3_folder):
    import gc

    engine = Engine(plan_for(["pipefusion"], str(tiny_sd3_folder), {**ONE, "steps": 3}))

    def tensors():
        gc.collect()
        return sum(1 for o in gc.get_objects() if type(o) is torch.Tensor)

    engine.generate("a")
    before = tensors()
    for i in range(10):
        engine.generate(f"prompt {i}", height=16 + 8 * (i % 3))
    assert tensors() <= before + 5
