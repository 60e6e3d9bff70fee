"""An engine in a line of Python."""

from __future__ import annotations

import sys

import pytest
import torch

from xdit_core import Engine, UsageError
from xdit_core.engine.pretrained import plan_from, steps_observer
from xdit_core.testing.runs import generate

ASKED = {"steps": 2, "height": 16, "width": 16, "output_type": "latent", "device": "cpu", "max_sequence_length": 5}


def test_from_a_folder(tiny_sd3_folder):
    values = {**ASKED, "pipefusion.patches": 2, "pipefusion.stages": 1}
    want = generate(["pipefusion"], str(tiny_sd3_folder), {**values, "seed": 3})[0]
    more = {"pipefusion": {"patches": 2, "stages": 1}}
    with Engine.from_pretrained(tiny_sd3_folder, plugins="pipefusion", **ASKED, **more) as engine:
        assert repr(engine) == "Engine(sd3, pipefusion, rank 0 of 1, cpu, torch.float32)"
        assert torch.equal(engine.generate("a red fox", seed=3).latents, want)
        first, second = engine.generate(["a red fox", "blue heart"], seed=3)
        assert torch.equal(first.latents, want)
        assert (second.prompt, second.index) == ("blue heart", 1)


def test_a_name_and_arguments_of_the_pipeline():
    plan = plan_from("emoji", ["usp"], call={"clip_skip": 1}, steps=3, guidance=None)
    assert (plan.model, plan.run.steps, plan.world, plan.values["call.clip_skip"]) == ("emoji", 3, 1, 1)


def test_processes_of_torchrun_without_a_process_group(monkeypatch):
    """Each would draw the whole picture by itself, and nobody would notice."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match=r"^WORLD_SIZE=2 says .*; call torch\.distributed\.init_process_group\(\)"):
        Engine.from_pretrained("emoji", plugins="usp")
    with Engine.from_pretrained("emoji", nproc=1, device="cpu") as engine:
        assert engine.plan.world == 1


@pytest.mark.parametrize("plugins", ["pipefuson", ["pipefuson"], "usp, pipefuson"])
def test_a_typo_in_a_plugin(plugins):
    with pytest.raises(UsageError, match=r"unknown plugin 'pipefuson'.*did you mean pipefusion\?"):
        plan_from("emoji", plugins)


def test_a_typo_in_the_model():
    with pytest.raises(UsageError, match=r"unknown model 'emojy'.*did you mean emoji\?"):
        plan_from("emojy")


def test_progress(monkeypatch, capsys):
    """A bar in a notebook or where it is asked for, on the first rank; what is callable is called."""
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    told = []
    assert steps_observer(None, 0) is None
    assert steps_observer(True, 1) is None
    steps_observer(lambda *step: told.append(step), 1).step_done(1, 2)
    assert told == [(1, 2)]
    bar = steps_observer(True, 0)
    for step in (1, 2, 1, 2):
        bar.step_done(step, 2)
    assert capsys.readouterr().err.count("100%") == 2
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    assert steps_observer(None, 0) is not None
