"""Mistakes in plugins and adapters end in a sentence that names whose they are, and never in a wrong picture."""

from __future__ import annotations

import dataclasses
from contextlib import suppress

import pytest
import torch

from xdit_core import Built, Declaration, Engine, PlanRefused, PluginError, Problem, Registry, Transform, Wrap, hookimpl
from xdit_core.observe.status import STARTING
from xdit_core.points.compose import OwnedWrap, compose
from xdit_core.records import POINTS
from xdit_core.registry.owners import Owner, owned_spec
from xdit_core.testing.runs import changed_record, diffusers_latents, plan_for
from xdit_core.worker.failure import failure

PIPE = {"pipefusion.stages": 1, "pipefusion.patches": 2}
LEVELS = [f"{point}/{level}" for point, levels in POINTS.items() for level in levels]


class OneWrap:
    """A strategy with one wrap."""

    def __init__(self, place, wrap):
        self.place, self.wrap = place, wrap

    @hookimpl
    def xdit_declare(self, settings, facts):
        return Declaration(wraps=(Wrap(*self.place.split("/")),))

    @hookimpl
    def xdit_build(self, settings, rank):
        return Built(wraps={self.place: self.wrap})


def generate(folder, place, wrap, plugins=(), settings=None, **changes):
    """One request through a strategy with one wrap."""
    extra = {"odd": OneWrap(place, wrap)}
    engine = Engine(plan_for(["odd", *plugins], str(folder), settings, extra=extra), Registry(extra))
    return engine.generate("a red fox", **{"steps": 2, **changes})


@pytest.mark.parametrize("place", LEVELS)
def test_a_wrap_without_return(tiny_sd3_folder, place):
    """It would give a garbage picture, or a traceback in the model."""

    def forgetful(inner, *args, **kwargs):
        inner(*args, **kwargs)

    with pytest.raises(
        PluginError, match=rf"^plugin odd returned None \(is a `return` missing\?\).* from its wrap at {place};"
    ):
        generate(tiny_sd3_folder, place, forgetful, output_type="image")


@pytest.mark.parametrize("place", LEVELS)
def test_an_exception_in_a_wrap_names_its_plugin(tiny_sd3_folder, place):
    def broken(inner, *args, **kwargs):
        inner(*args, **kwargs)
        raise ZeroDivisionError("division by zero.")

    with pytest.raises(
        PluginError,
        match=rf"^plugin odd failed in its wrap at {place}: ZeroDivisionError: division by zero \(test_mistakes.py, "
        rf"line \d+\)\.$",
    ) as caught:
        generate(tiny_sd3_folder, place, broken, output_type="image")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_wrap_that_passes_through_is_right(tiny_sd3_folder):
    """Including prompts that are cut into patches, and sizes that change: the checks refuse nothing that the model's
    own code returns."""
    for place in LEVELS:
        latents = generate(
            tiny_sd3_folder, place, lambda inner, *args, **kwargs: inner(*args, **kwargs), steps=4
        ).latents
        assert torch.equal(latents, diffusers_latents(str(tiny_sd3_folder)))


def lost_rows(inner, rows):
    """Half of them."""
    out = inner(rows)
    return out.but(tokens=out.tokens[:, : out.tokens.shape[1] // 2])


def half(inner, x):
    """In half precision."""
    return inner(x).half()


def narrow(inner, x):
    """One column less."""
    return inner(x)[..., :-1]


@pytest.mark.parametrize(
    ("place", "wrap", "says"),
    [
        (
            "trunk/reuse",
            lost_rows,
            r"Rows whose tokens are a tensor of shape \(.*\) and torch.float32 where shape \(.*\) is expected",
        ),
        ("trunk/gather", lambda inner, rows: inner(rows).tokens, r"a tensor of shape .* where Rows are expected"),
        ("trunk/stage", lambda inner, rows: inner(rows).but(text=()), "Rows whose text is a tuple"),
        (
            "attention/exchange",
            half,
            r"a tensor of shape .* and torch.float16 where shape .* and torch.float32 are expected",
        ),
        ("attention/kernel", narrow, r"a tensor of shape .* where shape"),
        ("attention/cache", lambda inner, call: (inner(call), None), "a tuple where shape"),
        ("forward/reuse", narrow, r"a tensor of shape .* where a prediction of shape \(2, any, 16, 16\) is expected"),
        ("decode/split", lambda inner, x, **_: "picture", "a str as pictures of 1 latents"),
        ("request/split", lambda inner, request: [None], "a list where a list of outputs is expected"),
    ],
)
def test_a_result_of_another_shape_or_kind(tiny_sd3_folder, place, wrap, says):
    with pytest.raises(PluginError, match=f"^plugin odd returned {says}"):
        generate(tiny_sd3_folder, place, wrap, output_type="image")


def test_a_size_that_comes_later_is_checked_too(tiny_sd3_folder):
    """An attention wrap is checked at the first use of each block, call and size, also where patches make the size."""

    def odd_in_patches(inner, call):
        out = inner(call)
        return out if call.context.patch is None or call.block < 2 else out[..., :-1]

    with pytest.raises(PluginError, match=r"plugin odd returned a tensor of shape .* from its wrap at attention/ring"):
        generate(tiny_sd3_folder, "attention/ring", odd_in_patches, ["pipefusion"], PIPE, steps=3)


def test_errors_of_what_lies_inside_pass(tiny_sd3_folder):
    """Neither a callback of the user nor a refusal of the core is the plugin's mistake."""

    def passing(inner, *args, **kwargs):
        return inner(*args, **kwargs)

    def stop(pipe, i, t, values):
        raise KeyError("stop")

    for place in ("request/split", "forward/reuse", "trunk/reuse", "attention/cache"):
        with pytest.raises(KeyError, match="stop"):
            generate(tiny_sd3_folder, place, passing, call={"callback_on_step_end": stop})

    def base(x):
        raise ValueError(x)

    owner = Owner("plugin", "outer", "some-package", "1.2")
    run = compose(
        [OwnedWrap(passing, owner, "forward/reuse"), passing, OwnedWrap(passing, owner, "forward/split")], base
    )
    with pytest.raises(ValueError, match="inner"):
        run("inner")


def test_memory_and_lost_ranks_keep_their_type():
    """The report of failures tells by the type who is to blame; the plugin is a note."""
    owner = Owner("plugin", "outer", "some-package", "1.2")
    for error in (
        torch.OutOfMemoryError("CUDA out of memory"),
        torch.distributed.DistNetworkError("gone"),
        MemoryError(),
    ):

        def failing(inner, x, error=error):
            raise error

        with pytest.raises(type(error)) as caught:
            compose([OwnedWrap(failing, owner, "forward/reuse")], abs)(1)
        assert caught.value.__notes__ == [
            "This happened in its wrap at forward/reuse of plugin outer of some-package 1.2."
        ]
    assert failure(torch.distributed.DistNetworkError("gone"), 0, STARTING)["victim"]


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("trunk.attention", lambda block: 1 / 0, "failed in its trunk.attention: ZeroDivisionError: division by zero"),
        ("text.rows", lambda given: given["nothing"], "failed in its text.rows: KeyError: 'nothing'"),
        ("text.rows", lambda given: None, "returned None from its text.rows, where Integral is expected"),
        (
            "latents.padding_tokens",
            lambda tokens: tokens.nothing,
            "failed in its latents.padding_tokens: AttributeError",
        ),
        ("request.check", lambda configs, asked: 1 / 0, "failed in its request.check: ZeroDivisionError"),
        (
            "request.check",
            lambda configs, asked: (1 / 0 for _ in "x"),
            "failed in its request.check: ZeroDivisionError",
        ),
        (
            "request.check",
            lambda configs, asked: None,
            "returned None from its request.check, where list or tuple is expected",
        ),
        ("request.uses_cfg", lambda asked: asked["nothing"], "failed in its request.uses_cfg: KeyError"),
        ("latents.token_pixels", lambda configs: configs["nothing"], "failed in its latents.token_pixels: KeyError"),
        ("latents.row_unit", lambda config: config["nothing"], "failed in its latents.row_unit: KeyError"),
        (
            "trunk.long_skips",
            lambda count: [count],
            r"returned \[4\] from its trunk.long_skips, where Mapping is expected",
        ),
        (
            "request.encode_subject",
            lambda configs, subject, count: subject.nothing,
            "failed in its request.encode_subject: AttributeError",
        ),
    ],
)
def test_an_adapter_is_named(tiny_sd3_folder, path, value, says):
    spec = changed_record(Registry().model("sd3")[0], path, value)
    with pytest.raises(PluginError, match=f"^adapter sd3 {says}"):
        models = {"extra_models": {"sd3": spec}}
        settings = {"pipefusion.stages": 1}
        Engine(plan_for(["pipefusion"], str(tiny_sd3_folder), settings, **models), Registry(**models)).generate(
            "a red fox", steps=1
        )


def test_a_block_that_an_adapter_makes(tiny_sd3_folder):
    spec, origin = Registry().model("sd3")

    def make(denoiser, index, block):
        raise IndexError("no such block")

    spec = changed_record(spec, "trunk.blocks", (dataclasses.replace(spec.trunk.blocks[0], make=make),))
    models = {"extra_models": {"sd3": spec}}
    with pytest.raises(
        PluginError, match=r"adapter sd3 failed in its trunk.blocks\[0\].make: IndexError: no such block"
    ):
        Engine(plan_for(["pipefusion"], str(tiny_sd3_folder), {"pipefusion.stages": 1}, **models), Registry(**models))
    assert str(owned_spec(spec, ("xdit-more", "2.0")).trunk.blocks[0].make.owner) == "adapter sd3 of xdit-more 2.0"
    assert origin[0] == "xdit" and Registry().model("sd3")[0] == Registry().model("sd3")[0]


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("transform", "its transform in the phase adapt"),
        ("job", "the begin of a job"),
        ("end", "the end of a job"),
        ("close", "its close"),
    ],
)
def test_what_is_no_wrap_is_named_too(tiny_sd3_folder, what, says):
    def broken(*args):
        raise ZeroDivisionError("division by zero")

    class Ends:
        def __enter__(self):
            return self

        def __exit__(self, *details):
            broken()

    class Odd:
        @hookimpl
        def xdit_declare(self, settings, facts):
            return Declaration(transforms=(Transform("adapt"),))

        @hookimpl
        def xdit_build(self, settings, rank):
            parts = {"job": broken} if what == "job" else {"job": Ends} if what == "end" else {}
            return Built(
                transforms={"adapt": broken if what == "transform" else lambda denoiser: None},
                close=broken if what == "close" else None,
                **parts,
            )

    extra = {"odd": Odd()}
    with pytest.raises(PluginError, match=f"^plugin odd failed in {says}: ZeroDivisionError"):
        engine = Engine(plan_for(["odd"], str(tiny_sd3_folder), extra=extra), Registry(extra))
        engine.generate("a red fox", steps=1)
        engine.close()


@pytest.mark.parametrize(
    ("place", "wrap", "says"),
    [
        (
            "attention/exchange",
            lambda inner, call: inner(call.q),
            "a tensor of shape .* where one AttentionCall is expected",
        ),
        (
            "attention/ring",
            lambda inner, call: inner(call.but(k=call.k[:, :, 1:])),
            "queries, keys and values that do not fit: ",
        ),
        (
            "attention/kernel",
            lambda inner, call: inner(call.but(q=call.q.half())),
            "queries, keys and values that do not fit: ",
        ),
        ("trunk/reuse", lambda inner, rows: inner(rows, rows), "a Rows and a Rows where one Rows is expected"),
        ("forward/split", lambda inner, call: inner(), "nothing"),
        (
            "forward/reuse",
            lambda inner, call: inner(call.latents),
            "a tensor of shape .* where one ForwardCall is expected",
        ),
        ("request/split", lambda inner, request: inner(request.jobs), "a tuple where one Request is expected"),
        ("decode/split", lambda inner, x, **more: inner(None, **more), "None.* where one Tensor is expected"),
    ],
)
def test_what_a_wrap_passes_on(tiny_sd3_folder, place, wrap, says):
    """Else the error would come out of the core or the model, and name nobody."""
    with pytest.raises(
        PluginError, match=f"^plugin odd passed on {says}.* in its wrap at {place}; correct odd, or run without it"
    ):
        generate(tiny_sd3_folder, place, wrap, output_type="image")


def test_a_trace_names_plugins_too(tiny_sd3_folder):
    """Tracing puts its own wraps between those of the plugins."""

    def broken(inner, rows):
        inner(rows)
        raise ZeroDivisionError

    with pytest.raises(PluginError, match=r"^plugin odd failed in its wrap at trunk/reuse: ZeroDivisionError \("):
        generate(tiny_sd3_folder, "trunk/reuse", broken, settings={"trace": True})


def test_a_strategy_cannot_swallow_the_error_of_a_job(tiny_sd3_folder):
    """The request would end without pictures and without a word."""

    class Swallows:
        @hookimpl
        def xdit_declare(self, settings, facts):
            return Declaration()

        @hookimpl
        def xdit_build(self, settings, rank):
            return Built(job=lambda: suppress(Exception))

    def stop(pipe, i, t, values):
        raise KeyError("stop")

    extra = {"odd": Swallows()}
    with pytest.raises(KeyError, match="stop"):
        Engine(plan_for(["odd"], str(tiny_sd3_folder), extra=extra), Registry(extra)).generate(
            "a red fox", call={"callback_on_step_end": stop}
        )


def test_a_request_for_what_the_model_does_not_know_is_refused_before_it_begins(tiny_sd3_folder):
    """As by the plan; what the adapter says it with was a traceback in the middle of the request."""

    def known(configs, subject, count):
        if subject != "a red fox":
            raise PlanRefused([Problem(f"there is no {subject}", "ask for a red fox")])
        return subject

    models = {"extra_models": {"sd3": changed_record(Registry().model("sd3")[0], "request.encode_subject", known)}}
    engine = Engine(plan_for([], str(tiny_sd3_folder), {"prompt": "a red fox"}, **models), Registry(**models))
    with pytest.raises(PlanRefused, match=r"^there is no hare; ask for a red fox"):
        engine.generate(["a red fox", "hare"], steps=1)
    assert len(engine.generate(["a red fox"], steps=1)) == 1
