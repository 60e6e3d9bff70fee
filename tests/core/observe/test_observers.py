"""Observers of plugins: they see what happens, change nothing, and their mistakes are their own."""

from __future__ import annotations

from contextlib import contextmanager, suppress

import pytest
import torch

from helpers import counting
from xdit_core import Built, Declaration, Engine, Observer, Plan, PluginError, Registry, Wrap, hookimpl
from xdit_core.observe.observer import Awaited, Observers, Sending, combined
from xdit_core.observe.status import STARTING
from xdit_core.registry.owned_observer import OwnedObserver
from xdit_core.registry.owners import Owner
from xdit_core.testing.runs import diffusers_latents, plan_for

EXTRA = {"counting": counting}


def counted(folder, plugins, settings, **more):
    """Latents of a run that is counted, and the counts."""
    engine = Engine(plan_for([*plugins, "counting"], folder, settings, extra=EXTRA), Registry(EXTRA), **more)
    (observer,) = (part for part in engine.rank.observer.parts if isinstance(part, OwnedObserver))
    output = engine.generate("a red fox")
    engine.close()
    return output, observer._observer.counts, observer._observer.times


def two_stages(folder):
    output, counts, _ = counted(folder, ["pipefusion"], {"pipefusion.stages": 2, "pipefusion.patches": 2})
    return output.latents, counts


def test_a_plugin_that_only_observes(tiny_sd3_folder):
    """It is selected like a strategy, needs no declaration, and the plan stays exact; in a serial run it sees the rows
    of every block."""
    plan = plan_for(["counting"], str(tiny_sd3_folder), extra=EXTRA)
    assert plan.exactness == "exact" and plan.world == 1 and not plan.wraps
    assert plan.observers == ("counting",) and Plan.from_json(plan.to_json()) == plan
    plain = plan_for([], str(tiny_sd3_folder))
    assert plan.digest() == plain.digest() != plan_for(["dp"], str(tiny_sd3_folder)).digest()  # results are the same
    assert plan_for(["counting"], str(tiny_sd3_folder), {"counting.every": 3}, extra=EXTRA).digest() == plain.digest()
    output, counts, times = counted(str(tiny_sd3_folder), [], {"output_type": "image"})
    assert counts["steps"] == 4 and counts["built"] == counts["closed"] == counts["jobs"] == counts["outputs"] == 1
    assert counts["latents"] == 1 and counts["forward "] == counts["forward  begun"] == 4
    assert counts["phase denoising"] == 5 and times == sorted(times) and len(times) == 7
    tokens = plan.facts.tokens
    assert {place: counts[f"rows {place}"] for place in range(6)} == dict.fromkeys(range(5), 4 * tokens) | {5: 0}
    assert output.images


def test_it_sees_stages_patches_waits_and_messages(gloo, tiny_sd3_folder):
    """4 steps, of which 1 is whole and 3 are in 2 patches; guidance is batched."""
    results = gloo.run(two_stages, str(tiny_sd3_folder), world=2)
    for rank, (latents, counts) in enumerate(results):
        assert torch.equal(latents, results[0][0])
        assert [counts[f"block {i}"] for i in range(4)] == ([7, 7, 0, 0], [0, 0, 7, 7])[rank]
        assert counts["trunk pipefusion"] == 7 and counts["forward pipefusion"] == 4 and counts["steps"] == 4
        assert counts[f"messages to {1 - rank}"] > 0 and counts["waits for stages"] > 0
        assert all(counts[name] == n for name, n in counts.items() if f"{name} begun" in counts)


def test_what_is_watched_computes_the_same(tiny_sd3_folder):
    output, *_ = counted(str(tiny_sd3_folder), [], {})
    assert torch.equal(output.latents, diffusers_latents(str(tiny_sd3_folder)))


def test_settings_decide_what_is_seen(tiny_sd3_folder):
    settings = {"pipefusion.stages": 1, "pipefusion.patches": 2, "counting.every": 2}
    _, counts, _ = counted(str(tiny_sd3_folder), ["pipefusion"], settings)
    assert counts["block 0"] and counts["block 2"] and not counts["block 1"] and not counts["block 3"]


class Odd:
    """A strategy with one wrap that is watched by its own observer."""

    def __init__(self, observer):
        self.observer = observer

    @hookimpl
    def xdit_declare(self, settings, facts):
        return Declaration(wraps=(Wrap("trunk", "reuse"),))

    @hookimpl
    def xdit_build(self, settings, rank):
        return Built(wraps={"trunk/reuse": lambda inner, rows: inner(rows)})

    @hookimpl
    def xdit_observe(self, rank):
        return self.observer


def broken(*args):
    raise ZeroDivisionError("division by zero")


@contextmanager
def ends():
    yield
    broken()


class FailsInExit:
    def __enter__(self):
        return self

    def __exit__(self, *details):
        broken()


@pytest.mark.parametrize(
    ("method", "does", "says"),
    [
        ("step_done", broken, "failed in step_done of its observer: ZeroDivisionError: division by zero"),
        ("status", broken, "failed in status of its observer: ZeroDivisionError"),
        ("job_started", broken, "failed in job_started of its observer: ZeroDivisionError"),
        ("output_done", broken, "failed in output_done of its observer: ZeroDivisionError"),
        ("engine_built", broken, "failed in engine_built of its observer: ZeroDivisionError"),
        ("rows", broken, "failed in rows of its observer: ZeroDivisionError"),
        ("latents", broken, "failed in latents of its observer: ZeroDivisionError"),
        ("point", broken, "failed in point of its observer: ZeroDivisionError"),
        ("point", lambda *_: broken, "failed in the begin of point of its observer: ZeroDivisionError"),
        ("point", lambda *_: ends, "failed in the end of point of its observer: ZeroDivisionError"),
        ("point", lambda *_: 5, "returned 5 from point of its observer, where a function that makes a context"),
        ("block", lambda *_: FailsInExit, "failed in the end of block of its observer: ZeroDivisionError"),
        ("block", lambda *_: list, "failed in the begin of block of its observer: AttributeError"),
    ],
)
def test_an_error_in_an_observer_names_its_plugin(tiny_sd3_folder, method, does, says):
    observer = type("Faulty", (Observer,), {method: lambda self, *args: does(*args)})()
    extra = {"odd": Odd(observer)}
    with pytest.raises(PluginError, match=f"^plugin odd {says}"):
        engine = Engine(plan_for(["odd"], str(tiny_sd3_folder), extra=extra), Registry(extra))
        engine.generate("a red fox", steps=1, output_type="image")


def test_waits_and_messages_too():
    faulty = type("Faulty", (Observer,), {"waiting": broken, "sending": broken})()
    owned = OwnedObserver(faulty, Owner("plugin", "odd", "some-package", "1.2"))
    contexts = {"waiting": owned.waiting(Awaited("x")), "sending": owned.sending(Sending("a", "b", 1, 2, 3))}
    for name, context in contexts.items():
        says = f"^plugin odd of some-package 1.2 failed in the begin of {name} of its observer"
        with pytest.raises(PluginError, match=says), context:
            pass


@pytest.mark.parametrize("returned", [5, Observer, [Observer()], "watch"])
def test_a_hook_that_returns_something_else(tiny_sd3_folder, returned):
    extra = {"odd": Odd(returned)}
    with pytest.raises(PluginError, match=r"^plugin odd must return an Observer from xdit_observe; it returned "):
        Engine(plan_for(["odd"], str(tiny_sd3_folder), extra=extra), Registry(extra))


def test_a_rank_that_is_not_watched(tiny_sd3_folder):
    extra = {"odd": Odd(None)}
    engine = Engine(plan_for(["odd"], str(tiny_sd3_folder), extra=extra), Registry(extra))
    assert type(engine.rank.observer) is Observer


def test_an_observer_cannot_swallow_an_error(tiny_sd3_folder):
    def stop(pipe, i, t, values):
        raise KeyError("stop")

    observer = type("Swallows", (Observer,), {"point": lambda self, *_: lambda: suppress(Exception)})()
    extra = {"odd": Odd(observer)}
    engine = Engine(plan_for(["odd"], str(tiny_sd3_folder), extra=extra), Registry(extra))
    with pytest.raises(KeyError, match="stop"):
        engine.generate("a red fox", call={"callback_on_step_end": stop})


def test_several_as_one():
    """Contexts are entered in order and left in the other; what nobody overrides has no context."""
    told = []

    class Tells(Observer):
        def __init__(self, name):
            self.name = name

        @contextmanager
        def waiting(self, awaited):
            told.append(f"{self.name} in")
            yield
            told.append(f"{self.name} out")

        def status(self, status):
            told.append(f"{self.name} {status}")

        def block(self, index):
            return (lambda: self.waiting(None)) if index == 0 else None

    both = combined((None, Tells("a"), Observer(), Observers((Tells("b"),))))
    assert [part.name for part in both.parts] == ["a", "b"]
    for context in (both.waiting(Awaited("x")), both.block(0)()):
        with context:
            told.append("inside")
        assert told == ["a in", "b in", "inside", "b out", "a out"]
        told.clear()
    both.status(STARTING)
    assert told == ["a starting", "b starting"]
    assert both.block(1) is None and both.point("trunk", "", "") is None and not both.overrides("rows")
    assert both.sending(Sending("a", "b", 1, 2, 3)) is Observer().sending(Sending("a", "b", 1, 2, 3))
    assert type(combined((None, Observer()))) is Observer and combined((None, both.parts[0])) is both.parts[0]
