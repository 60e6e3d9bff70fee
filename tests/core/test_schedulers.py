"""scheduler= must fit what the model predicts: known before anything is loaded, and without torch."""

from __future__ import annotations

import subprocess
import sys

import diffusers
import pytest

from xdit_core import PlanRefused
from xdit_core.checkpoints.schedulers import FLOW, check_scheduler, known_schedulers
from xdit_core.engine.engine import Engine
from xdit_core.testing.models import save_tiny_pixart
from xdit_core.testing.runs import plan_for


def test_the_text_of_diffusers_is_read_rightly():
    """Every scheduler class that diffusers exports is known, with the default that its constructor has."""
    known = known_schedulers()
    exported = {
        name
        for name in dir(diffusers)
        if isinstance(cls := getattr(diffusers, name), type)
        and issubclass(cls, diffusers.SchedulerMixin)
        and cls.__name__ != "SchedulerMixin"
    }
    assert len(exported) > 30
    checked = 0
    for name in exported:
        try:
            config = getattr(diffusers, name)().config
        except (ImportError, TypeError):  # needs torchsde, or arguments
            continue
        assert known[name].chooses == ("prediction_type" in config), name
        if known[name].chooses:
            assert known[name].prediction({}) == config["prediction_type"], name
        checked += 1
    assert checked > 30


def test_flow_matching_and_noise_do_not_mix(tiny_sd3_folder, tmp_path):
    """A velocity that is taken for noise gives a wrong picture without a word."""
    flow = (
        r"does not fit this model, which predicts flow_prediction \(flow matching\); use one of "
        r"FlowMatchEulerDiscreteScheduler, "
    )
    for name in ("DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"):
        with pytest.raises(PlanRefused, match=f"scheduler={name} {flow}"):
            plan_for([], str(tiny_sd3_folder), {"scheduler": name})
    for name in ("FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler"):
        assert plan_for([], str(tiny_sd3_folder), {"scheduler": name}).run.scheduler == name
    pixart = {"model": "pixart_sigma", "scheduler": "FlowMatchEulerDiscreteScheduler", "max_sequence_length": None}
    with pytest.raises(PlanRefused, match=r"which predicts epsilon; use one of .*DPMSolverMultistepScheduler"):
        plan_for([], str(save_tiny_pixart(tmp_path / "m")), pixart)


def test_the_configuration_decides():
    """Solvers that know flow matching take it where the model's configuration says so, and v_prediction is passed
    on."""
    wan = {"_class_name": "UniPCMultistepScheduler", "prediction_type": FLOW, "use_flow_sigmas": True}
    for name in ("FlowMatchEulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"):
        assert not check_scheduler(name, wan)
    assert check_scheduler("DDIMScheduler", wan)
    video = {"_class_name": "CogVideoXDDIMScheduler", "prediction_type": "v_prediction"}
    assert not check_scheduler("DDIMScheduler", video)
    assert check_scheduler("UnCLIPScheduler", video) and check_scheduler("FlowMatchLCMScheduler", video)
    assert not check_scheduler("FlowMatchLCMScheduler", {"_class_name": "OneOfYourOwn"})


def test_an_unknown_one(tiny_sd3_folder):
    with pytest.raises(
        PlanRefused,
        match=r"scheduler=FlowMatchEuler is not a scheduler class of diffusers; use one of .*FlowMatch",
    ):
        plan_for([], str(tiny_sd3_folder), {"scheduler": "FlowMatchEuler"})


def test_that_of_a_given_pipeline(tiny_sd3_folder):
    """It may have another scheduler than the folder of the plan."""
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(tiny_sd3_folder, text_encoder_3=None, tokenizer_3=None)
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler(prediction_type="v_prediction")
    plan = plan_for([], str(tiny_sd3_folder), {"scheduler": "FlowMatchHeunDiscreteScheduler"})
    with pytest.raises(PlanRefused, match="which predicts v_prediction"):
        Engine(plan, pipe=pipe)


def test_without_torch():
    code = "import sys; from xdit_core.checkpoints.schedulers import check_scheduler as check; assert check('A', {}); "
    code += "assert not {'torch', 'diffusers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
