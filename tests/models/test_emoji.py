"""The bundled model: trained weights that go through the same code as any checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from xdit_core import Engine, Registry, make_plan
from xdit_core.testing.runs import diffusers_latents

FOLDER = Path(Registry().model("emoji")[0].checkpoint.path)


@pytest.fixture(scope="module")
def engine():
    return Engine(make_plan([], {"model": "emoji", "device": "cpu"}))


def colour(image):
    """Mean red, green and blue where the picture is not white."""
    data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(-1, 3).float()
    return data[data.min(dim=1).values < 200].mean(dim=0).tolist()


def test_a_red_heart_is_red_and_a_blue_one_blue(engine):
    red, green, blue = colour(engine.generate("red heart", seed=1).images[0])
    assert red > 180 and green < 110 and blue < 110
    red, green, blue = colour(engine.generate("blue heart", seed=1).images[0])
    assert blue > 150 and red < 110


def test_it_is_the_pipeline_of_diffusers(engine):
    latents = engine.generate("rocket", output_type="latent", steps=4).latents
    options = {"guidance_scale": 3.0, "max_sequence_length": 0, "num_inference_steps": 4}
    assert torch.equal(latents, diffusers_latents(str(FOLDER), "rocket", dtype=torch.float32, **options))


def test_it_fits_into_the_package():
    files = [p for p in FOLDER.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 25_000_000
    assert {p.suffix for p in files} <= {".json", ".safetensors", ".txt"}
    assert (FOLDER.parent / "OFL.txt").exists() and (FOLDER.parent / "MODEL_CARD.md").exists()


def test_names_are_found_again(engine):
    """Ten of its names, by the nearest training picture; the full figure is in the model card."""
    data = pytest.importorskip("xdit_emoji.training.data")
    if not Path(data.FONT).exists() or not Path(data.NAMES).exists():
        pytest.skip("needs the packages fonts-noto-color-emoji and unicode-data")
    from xdit_emoji.training.evaluate import questions, score, to_tensor

    names, pictures = data.load(data.chosen_names())
    assert len(names) == 241
    asked = questions(names, 10, seed=5)
    right, wrong = score(lambda n, s: to_tensor(engine.generate(n, seed=s).images[0]), names, pictures, asked)
    assert right >= 7, wrong


@pytest.mark.slow
def test_the_training_scripts_run(tmp_path, monkeypatch):
    data = pytest.importorskip("xdit_emoji.training.data")
    if not Path(data.FONT).exists() or not Path(data.NAMES).exists():
        pytest.skip("needs the packages fonts-noto-color-emoji and unicode-data")
    from xdit_emoji.training import transformer, vae

    def run(module, *words):
        monkeypatch.setattr("sys.argv", ["script", *map(str, words)])
        module.main()

    few = data.load(set(sorted(data.chosen_names())[:80]))
    monkeypatch.setattr(data, "load", lambda: few)  # there are thousands
    run(data, "--out", tmp_path)
    run(vae, "--data", tmp_path, "--out", tmp_path / "vae", "--minutes", 0.05, "--batch", 2, "--device", "cpu")
    (tmp_path / "names.txt").write_text("red heart\nrocket\n")
    words = (
        "--vae",
        tmp_path / "vae",
        "--names",
        tmp_path / "names.txt",
        "--out",
        tmp_path / "pipeline",
        "--minutes",
        0.05,
    )
    run(transformer, *words, "--batch", 2, "--layers", 2, "--no-bf16", "--device", "cpu")
    made = Engine(
        make_plan([], {"model": "emoji", "model.path": str(tmp_path / "pipeline"), "steps": 2, "device": "cpu"})
    )
    assert made.generate("red heart").images[0].size == (128, 128)
