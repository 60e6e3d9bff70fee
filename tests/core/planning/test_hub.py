"""What is fetched from the hub, and when."""

from __future__ import annotations

import fnmatch
import shutil
from pathlib import Path

import huggingface_hub
import pytest

from xdit_core import ModelError, Registry
from xdit_core.checkpoints import hub
from xdit_core.planning.planner import make_plan
from xdit_core.settings import ModelSettings

VALUES = {"model": "sd3", "model.path": "someone/tiny", "steps": 2, "device": "cpu"}


@pytest.fixture
def fetched(tiny_sd3_folder, tmp_path, monkeypatch):
    """A hub with one model; the files that were fetched from it."""
    names: list[str] = []

    def snapshot_download(source, allow_patterns, ignore_patterns=(), **where):
        assert source == "someone/tiny"
        for file in sorted(Path(tiny_sd3_folder).rglob("*")):
            name = str(file.relative_to(tiny_sd3_folder))
            wanted = any(fnmatch.fnmatch(name, p) for p in allow_patterns) and not any(
                fnmatch.fnmatch(name, p) for p in ignore_patterns
            )
            if file.is_file() and wanted and name not in names:
                names.append(name)
                (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, tmp_path / name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return names


def test_a_plan_that_is_only_looked_at_fetches_json_files(fetched):
    plan = make_plan([], VALUES, weights=False)
    assert plan.facts.blocks == 4
    assert fetched and all(name.endswith(".json") for name in fetched)


def test_a_run_fetches_the_weights_and_computes_the_same_plan(fetched):
    looked_at = make_plan([], VALUES, weights=False)
    plan = make_plan([], VALUES)
    assert "transformer/diffusion_pytorch_model.safetensors" in fetched
    assert plan.digest() == looked_at.digest()


def test_a_folder_without_weights_is_refused_even_if_only_looked_at(tiny_sd3_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_sd3_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(ModelError, match="safetensors"):
        make_plan([], {**VALUES, "model.path": str(folder)}, weights=False)


@pytest.mark.parametrize(
    ("path", "remote"), [("someone/tiny", True), (None, True), ("./tiny", False), ("a/b/c", False)]
)
def test_what_is_on_the_hub(path, remote):
    spec, _ = Registry().model("sd3")
    assert hub.on_hub(spec, ModelSettings(path=path)) is remote


def test_a_bundled_model_is_not_on_the_hub():
    spec, _ = Registry().model("emoji")
    assert not hub.on_hub(spec, ModelSettings())
