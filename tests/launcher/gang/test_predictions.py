"""One call of the denoiser by a gang equals that of diffusers."""

from __future__ import annotations

import warnings

import diffusers
import pytest
import torch
from safetensors.torch import load, save

from helpers.models.tiny import saved
from xdit_core import UsageError
from xdit_launcher import Gang
from xdit_launcher.gang.job import RequestFailed


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return saved("flux", tmp_path_factory.mktemp("flux") / "flux")


def gang_of(folder, tmp_path, plugins, **more):
    settings = {"model": "flux", "model.path": str(folder), "device": "cpu", "runs": str(tmp_path), "threads": 1}
    return Gang(plugins, {**settings, "height": 32, "width": 48, "steps": 2, "max_sequence_length": 8, **more})


def inputs(config, rows=6, columns=4, text=7):
    """What a pipeline gives a Flux transformer, for two pictures."""
    make = torch.Generator().manual_seed(0)
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1], ids[..., 2] = torch.arange(rows)[:, None], torch.arange(columns)
    shapes = {
        "hidden_states": (2, rows * columns, config.in_channels),
        "encoder_hidden_states": (2, text, config.joint_attention_dim),
        "pooled_projections": (2, config.pooled_projection_dim),
    }
    return {
        **{name: torch.randn(shape, generator=make) for name, shape in shapes.items()},
        **{"timestep": torch.tensor([0.7, 0.7]), "guidance": torch.tensor([3.5, 3.5])},
        **{"img_ids": ids.reshape(-1, 3), "txt_ids": torch.zeros(text, 3)},
    }


@pytest.mark.parametrize(("plugin", "degree"), [("usp", {"usp.ulysses": 2, "usp.ring": 1}), ("tp", {"tp.degree": 2})])
def test_a_prediction_equals_that_of_diffusers(folder, tmp_path, plugin, degree):
    model = diffusers.FluxTransformer2DModel.from_pretrained(folder, subfolder="transformer").eval()
    given = inputs(model.config)
    given = given if model.config.guidance_embeds else {k: v for k, v in given.items() if k != "guidance"}
    with torch.no_grad():
        expected = model(**given, return_dict=False)[0]
        smaller = inputs(model.config, 4, 4, 5)
        smaller = {name: smaller[name] for name in given}
        expected_smaller = model(**smaller, return_dict=False)[0]
    with gang_of(folder, tmp_path, [plugin], **degree) as gang:
        for arguments, grid, wanted in ((given, (6, 4), expected), (smaller, (4, 4), expected_smaller)):
            prediction = load(gang.predict(save(arguments), grid))["prediction"]
            torch.testing.assert_close(prediction, wanted, rtol=1e-5, atol=1e-5)
        with pytest.raises(RequestFailed, match="expected"):
            gang.predict(save(given), (5, 5))
        assert len(gang.generate("a red fox").pictures) == 1  # it still draws


def test_strategies_that_need_more_than_one_call_are_refused(folder, tmp_path):
    patches = {"pipefusion.patches": 2, "pipefusion.stages": 1}
    refused = pytest.raises(UsageError, match="pipefusion cannot divide a single call")
    with gang_of(folder, tmp_path, ["pipefusion"], **patches) as gang, refused:
        gang.predict(b"", (1, 1))
