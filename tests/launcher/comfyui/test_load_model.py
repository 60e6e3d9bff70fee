"""A MODEL whose denoiser is elsewhere, without ComfyUI: what goes there and what comes back."""

from __future__ import annotations

import sys
import types
import warnings

import diffusers
import pytest
import torch
from safetensors.torch import load, save

from helpers.models.tiny import saved
from xdit_comfyui.arguments import padded
from xdit_comfyui.model import GangDenoiser, ModelError, Ranks, start_gang
from xdit_core import UsageError

CASES = {
    "flux": ("FluxTransformer2DModel", {"in_channels": 64, "guidance_embeds": True}, (2, 16, 5, 8), 1.0),
    "wan": ("WanTransformer3DModel", {"in_channels": 16, "out_channels": 16}, (2, 16, 3, 7, 10), 1000.0),
}


class Executor:
    """ComfyUI's: calls what wraps the denoiser, here nothing."""

    @classmethod
    def new_class_executor(cls, original, owner, wrappers):
        assert wrappers == ["wrapped"]
        return types.SimpleNamespace(execute=original)


@pytest.fixture(autouse=True)
def comfy(monkeypatch):
    module = types.ModuleType("comfy.patcher_extension")
    module.WrapperExecutor, module.WrappersMP = Executor, types.SimpleNamespace(DIFFUSION_MODEL="denoiser")
    module.get_all_wrappers = lambda kind, options: options["wrappers"]
    monkeypatch.setitem(sys.modules, "comfy", types.ModuleType("comfy"))
    monkeypatch.setitem(sys.modules, "comfy.patcher_extension", module)


class FakeGang:
    """Calls a denoiser of diffusers, in this process."""

    plan = types.SimpleNamespace(dtype="float32")

    def __init__(self, denoiser):
        self.denoiser, self.alive, self.grids = denoiser, True, []

    def predict(self, arguments, grid):
        self.grids.append(grid)
        with torch.no_grad():
            return save({"prediction": self.denoiser(**load(arguments), return_dict=False)[0]})

    def close(self):
        self.alive = False


def made(family, tmp_path):
    """A denoiser of ComfyUI and the one behind it."""
    name, changes, shape, most = CASES[family]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind = getattr(diffusers, name)
        config = {**kind.load_config(saved(family, tmp_path / family), subfolder="transformer"), **changes}
        config.pop("out_channels") if family == "flux" else None
        torch.manual_seed(0)
        behind = kind.from_config(config).eval()
    denoiser = GangDenoiser(Ranks(lambda: FakeGang(behind)), family, behind.config)
    x, t = torch.randn(shape), torch.tensor([0.2, 0.9]) * most
    context = torch.randn(2, 7, behind.config.get("joint_attention_dim") or behind.config.text_dim)
    more = {"y": torch.randn(2, behind.config.pooled_projection_dim)} if family == "flux" else {}
    return denoiser, (x, t, context), {**more, "guidance": torch.tensor([3.5])} if more else more


@pytest.mark.parametrize("family", CASES)
def test_a_prediction_has_the_shape_of_the_latents_and_repeats(family, tmp_path):
    """That the values are ComfyUI's is tested with ComfyUI."""
    denoiser, given, more = made(family, tmp_path)
    options = {"wrappers": ["wrapped"]}
    prediction = denoiser(*given, transformer_options=options, **more)
    assert prediction.shape == given[0].shape and prediction.std() > 0
    gang = denoiser._ranks.gang
    assert gang.grids == [(-(-given[0].shape[-2] // 2), given[0].shape[-1] // 2)]
    gang.close()  # as if the ranks had died: others are started
    assert torch.equal(denoiser(*given, transformer_options=options, **more), prediction)
    assert denoiser._ranks.gang is not gang


def test_what_cannot_be_honoured_is_refused(tmp_path):
    denoiser, given, more = made("flux", tmp_path)
    for what, name in (
        ({"control": object()}, "a ControlNet"),
        ({"ref_latents": [given[0]]}, "ref_latents"),
        ({"transformer_options": {"patches_replace": {"dit": {}}}}, "patches_replace"),
    ):
        with pytest.raises(ModelError, match=f"does not take {name}; remove the node"):
            denoiser(*given, **more, **what)


def test_latents_are_padded_with_the_other_edge():
    x = torch.arange(12.0).reshape(1, 1, 3, 4)
    assert torch.equal(padded(x)[0, 0, 3], x[0, 0, 0]) and padded(x).shape == (1, 1, 4, 4)
    assert padded(torch.zeros(1, 2, 3, 3, 5)).shape == (1, 2, 3, 4, 6)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ("usp.ulysses", "usp.ulysses is no setting; write name=value"),
        ("model.trust_remote_code=yes", "cannot be set in a workflow"),
        ("runs=/tmp/x", "cannot be set in a workflow"),
    ],
)
def test_settings_of_a_workflow(tmp_path, settings, sentence):
    with pytest.raises(ModelError, match=sentence):
        start_gang("flux", "", "usp", settings, tmp_path)


def test_plans_that_need_more_than_one_call_start_no_ranks(tmp_path):
    with pytest.raises(UsageError, match="cannot divide a single call"):
        start_gang("flux", made_folder(tmp_path), "pipefusion", "device=cpu pipefusion.stages=1", tmp_path)
    assert not list(tmp_path.glob("**/rank*"))


def made_folder(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return saved("flux", tmp_path / "flux")
