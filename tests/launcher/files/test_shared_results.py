"""Results are shown to others: they say what made them, and nothing of the folders of whoever drew them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from xdit_core.checkpoints.fingerprints import checkpoint_fingerprint
from xdit_core.outputs import results
from xdit_core.outputs.existing import FilesThere
from xdit_core.outputs.metadata import embedded_settings, without_folders
from xdit_core.outputs.names import targets
from xdit_core.plan import Plan
from xdit_core.planning.planner import make_plan
from xdit_core.points.request import Output
from xdit_core.settings import parse_words


@pytest.fixture
def plan_of(tiny_sd3_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Plan]:
    """A plan with a copy of a checkpoint and a LoRA in the folder ``secret``."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_sd3_folder, "secret/sd3-mine")
    Path("secret/style.safetensors").write_bytes(b"one")

    def plan(*words: str, model: str = "secret/sd3-mine") -> Plan:
        own = [f"model.path={tmp_path / model}", f"lora={tmp_path}/secret/style.safetensors:0.8"]
        return make_plan([], parse_words(["model=sd3", "steps=2", "device=cpu", "max_sequence_length=5", *own, *words]))

    return plan


@pytest.mark.parametrize("suffix", ["png", "mp4", "safetensors"])
def test_no_folder_of_the_user_is_in_a_result(plan_of: Callable[..., Plan], tmp_path: Path, suffix: str) -> None:
    """Guards against absolute paths in what people put onto the web."""
    (tmp_path / "secret/prompts.txt").write_text("a fox\n")
    kind = "output_type=latent" if suffix == "safetensors" else "output_type=image"
    call = f'call.joint_attention_kwargs={{"file": "{tmp_path}/secret/x"}}'
    plan = plan_of(
        f"prompts={tmp_path}/secret/prompts.txt", f"out={tmp_path}/secret/", f"runs={tmp_path}/secret/runs", kind, call
    )
    picture = Image.new("RGB", (32, 32))
    images = {"png": [picture], "mp4": [[picture] * 2]}.get(suffix)
    path = tmp_path / f"a.{suffix}"
    results.write(
        Output("a fox", images=images, latents=None if images else torch.zeros(1, 4, 8, 8)), 0, path, plan, {}
    )
    for file in (path, *tmp_path.glob("a*.json")):
        data = file.read_bytes()
        assert b"secret" not in data and str(tmp_path).encode() not in data and str(Path.home()).encode() not in data, (
            file
        )
    found = embedded_settings(path)
    assert found is not None
    assert found["plan"]["settings"]["model.path"] == "sd3-mine"
    assert found["plan"]["settings"]["lora"] == ["style.safetensors:0.8"]
    assert found["plan"]["checkpoint"] == plan.checkpoint and found["plan"]["loras"] == list(plan.facts.loras)


def test_values_of_settings() -> None:
    """What names no folder stays as it is."""
    assert (
        without_folders("model.path", "stabilityai/stable-diffusion-3.5-large")
        == "stabilityai/stable-diffusion-3.5-large"
    )
    assert without_folders("model.path", "/data/models/sd3/") == "sd3" == without_folders("model.path", "~/sd3")
    assert without_folders("negative", "/ugly") == "/ugly" and without_folders("steps", 3) == 3
    assert without_folders("lora", ["/a/b:c", "/a/b.safetensors"]) == ["b:c", "b.safetensors"]
    assert (
        without_folders("call.x", '["/a/b", {"y": "~/c"}]') == '["b", {"y": "c"}]'
        and without_folders("call.x", "[") == "["
    )


def test_resume_tells_checkpoints_and_loras_by_their_contents(plan_of: Callable[..., Plan], tmp_path: Path) -> None:
    """Guards against keeping a picture of another model whose folder has the same name."""

    def is_kept(plan: Plan) -> bool:
        return bool(FilesThere.here(plan).kept)

    words = ("prompt=a fox", "out=o", "resume=yes")
    plan = plan_of(*words)
    results.write(Output("a fox", images=[Image.new("RGB", (32, 32))]), 0, targets(plan.run)[0][0], plan, {})
    assert is_kept(plan_of(*words))
    shutil.copytree("secret/sd3-mine", "moved/sd3-mine")
    assert is_kept(plan_of(*words, model="moved/sd3-mine"))
    weights = Path("moved/sd3-mine/transformer/diffusion_pytorch_model.safetensors")
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) * 3 // 4] + bytes(len(data) - len(data) * 3 // 4))  # as trained further
    assert not is_kept(plan_of(*words, model="moved/sd3-mine"))
    weights.write_bytes(data)
    assert is_kept(plan_of(*words, model="moved/sd3-mine"))
    Path("secret/style.safetensors").write_bytes(b"two")
    assert not is_kept(plan_of(*words))


def test_a_checkpoint_that_has_gone_costs_no_picture(plan_of: Callable[..., Plan]) -> None:
    plan = plan_of("prompt=a fox")
    shutil.rmtree("secret/sd3-mine")
    assert checkpoint_fingerprint(Path(plan.folder)) is None
    results.write(Output("a fox", images=[Image.new("RGB", (32, 32))]), 0, Path("out.png"), plan, {})
    found = embedded_settings(Path("out.png"))
    assert found is not None and found["plan"]["checkpoint"] is None
