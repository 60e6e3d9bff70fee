"""What a strategy acquires for a job it releases, whether the job went through or failed."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext

import pytest
import torch
import torch._dynamo
from torch._dynamo.callback import callback_handler

from xdit_core import Built, Declaration, Engine, PluginFailed, hookimpl
from xdit_core.registry.registry import Registry
from xdit_core.testing.runs import plan_for

PIPE = {"pipefusion.stages": 1, "pipefusion.patches": 3, "pipefusion.warmup": 1}
DISTRI = {"distrifusion.degree": 1, "distrifusion.patches": 3}


def failing(engine, **changes):
    """A request that fails behind its third step."""

    def stop(pipe, i, t, values):
        if i == 2:
            raise KeyError("stop")
        return values

    with pytest.raises(KeyError, match="stop"):
        engine.generate("a red fox", call={"callback_on_step_end": stop}, **changes)


class Recorder:
    """A strategy that writes down how its jobs begin and end."""

    def __init__(self, name, events, broken=False):
        self.name, self.events, self.broken = name, events, broken

    @hookimpl
    def xdit_declare(self, settings, facts):
        return Declaration()

    @hookimpl
    def xdit_build(self, settings, rank):
        @contextmanager
        def job():
            if self.broken:
                raise ValueError("cannot begin")
            self.events.append(f"{self.name} begins")
            try:
                yield
                self.events.append(f"{self.name} finishes")
            except BaseException as error:
                self.events.append(f"{self.name} sees {type(error).__name__}")
                raise
            finally:
                self.events.append(f"{self.name} releases")

        return Built(job=job)


def test_a_strategy_hears_of_success_and_of_failure(tiny_sd3_folder):
    events = []
    extra = {"one": Recorder("one", events), "two": Recorder("two", events)}
    engine = Engine(plan_for(["one", "two"], str(tiny_sd3_folder), extra=extra), Registry(extra))
    engine.generate("a red fox", steps=2)
    assert events == ["one begins", "two begins", "two finishes", "two releases", "one finishes", "one releases"]
    events.clear()
    failing(engine)
    assert events == [
        "one begins",
        "two begins",
        "two sees KeyError",
        "two releases",
        "one sees KeyError",
        "one releases",
    ]


def test_what_began_before_another_failed_to_begin_is_released(tiny_sd3_folder):
    events = []
    extra = {"one": Recorder("one", events), "two": Recorder("two", events, broken=True)}
    engine = Engine(plan_for(["one", "two"], str(tiny_sd3_folder), extra=extra), Registry(extra))
    with pytest.raises(PluginFailed, match="plugin two failed in the begin of a job: ValueError: cannot begin"):
        engine.generate("a red fox", steps=2)
    assert events == ["one begins", "one sees PluginFailed", "one releases"]


def test_compile_leaves_no_limit_and_no_listener_behind_a_failure(tiny_sd3_folder):
    """The limit of recompilations and the callbacks hold for the whole process, so another engine would have them."""
    torch._dynamo.reset()
    limit, listeners = torch._dynamo.config.recompile_limit, len(callback_handler.start_callbacks)
    engine = Engine(plan_for(["compile"], str(tiny_sd3_folder), {"compile.backend": "eager"}))
    failing(engine)
    assert torch._dynamo.config.recompile_limit == limit
    assert len(callback_handler.start_callbacks) == len(callback_handler.end_callbacks) == listeners


@pytest.mark.parametrize(("plugin", "settings"), [("pipefusion", PIPE), ("distrifusion", DISTRI)])
@pytest.mark.parametrize("fails", [False, True])
def test_keys_and_values_do_not_outlive_their_request(tiny_sd3_folder, plugin, settings, fails):
    """They are another user's data, and memory that the next request may need."""
    engine = Engine(plan_for([plugin], str(tiny_sd3_folder), settings))
    entries, kept = engine._state.branches._entries, []

    def look(pipe, i, t, values):
        kept.append(sum(len(entry.branch._kept) for entry in entries))
        if fails and i == 2:
            raise KeyError("stop")
        return values

    with pytest.raises(KeyError) if fails else nullcontext():
        engine.generate("a red fox", call={"callback_on_step_end": look})
    assert any(kept)
    assert not entries  # they hold keys and values, and the embeddings of the text
