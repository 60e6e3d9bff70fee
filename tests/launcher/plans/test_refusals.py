"""Bad input: one clear sentence, the right exit code, no process, no run folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

Say = Callable[..., Result]


def refused(result: Result, code: int, *parts: str) -> None:
    assert result.exit_code == code, result.output
    for part in parts:
        assert part in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("words", "code", "parts"),
    [
        (["--plugins", "upsp", "a fox"], 2, ["unknown plugin 'upsp'", "did you mean usp?"]),
        (["stesp=3", "a fox"], 2, ["unknown setting stesp; did you mean steps?"]),
        (["--plugins", "usp", "usp.ulises=2"], 2, ["unknown setting usp.ulises; did you mean usp.ulysses?"]),
        (["height=many"], 2, ["height=many is not a whole number", "height=2"]),
        (["guidance=nan"], 2, ["guidance=nan is not a number"]),
        (
            ["usp.ulysses=2"],
            2,
            ["usp.ulysses belongs to the plugin usp, which is not selected; add it: --plugins usp."],
        ),
        (["--plugins", "usp", "usp.ulysses=3"], 3, ["4 heads", "usp.ulysses=3", "use one of 1, 2, 4"]),
        (["--plugins", "usp", "usp.ulysses=2", "nproc=3"], 3, ["nproc=3", "usp.ulysses=2"]),
        (["nproc=2"], 3, ["nproc=2", "nothing can use more than one process"]),
        (["height=33"], 3, ["height=33 is not a multiple of 4", "32 and 36"]),
        (["threads=0", "images=0"], 3, ["threads=0 is too small; give 1 or more.", "images=0"]),
        (["--plugins", "pipefusion", "pipefusion.patches=0"], 3, ["pipefusion.patches=0", "use 1 to 8"]),
        (["--plugins", "pipefusion", "pipefusion.warmup=-1"], 3, ["pipefusion.warmup=-1 is negative"]),
        (["--plugins", "pipefusion", "pipefusion.warmup=9"], 3, ["warmup=9 is more than steps=3"]),
        (
            ["--plugins", "broken"],
            2,
            ["plugin broken of xdit-faulty 0.1 cannot be loaded", "xdit_missing_module", "uninstall"],
        ),
        ([""], 2, ["the prompt is empty; write what to draw"]),
        (["prompt=  "], 2, ["the prompt is empty; write what to draw"]),
        (["steps=4"], 2, ["steps is given twice"]),
        (["seed=1", "seed=2"], 2, ["seed is given twice; keep one of seed=1 and seed=2."]),
        (["prompts=nothing.txt"], 2, ["prompts=nothing.txt cannot be read", "give a text file"]),
        (["out=x.jpg"], 2, ["out=x.jpg ends in .jpg but pictures are written as PNG; use out=x.png"]),
        (["out=x.png", "output_type=latent"], 2, ["latents are written as safetensors; use out=x.safetensors"]),
        (["out=/proc/nope/x.png"], 2, ["out=/proc/nope/x.png cannot be written", "choose another place with out=."]),
        (["runs=/proc/nope"], 2, ["runs=/proc/nope cannot be written", "choose another place with runs=."]),
        (["--json", "a fox"], 2, ["--json shows a plan; add --dry-run."]),
        (["--on", "locl"], 2, ["unknown backend 'locl'", "did you mean local?"]),
        (["nproc=10000000000"], 3, ["nproc=10000000000 is too large; give 65536 or less."]),
        (
            ["images=1000000000", "height=1000000000"],
            3,
            ["images=1000000000 is too large", "height=1000000000 is too large"],
        ),
        (
            ["threads=100000", "timeout=1e300"],
            3,
            ["threads=100000 is too large", "timeout=1e+300 is too large; give at most"],
        ),
        (
            ["--plugins", "dp", "dp.degree=1000000000000"],
            3,
            ["dp.degree=1000000000000 need 1000000000000 processes; lower them"],
        ),
        (["output_type=film"], 3, ["output_type=film is unknown; use image or latent."]),
    ],
)
def test_a_sentence_with_the_fix(
    say: Say, tiny: tuple[str, ...], words: list[str], code: int, parts: list[str]
) -> None:
    refused(say(*tiny, *words), code, *parts)


def test_all_problems_at_once(say: Say, tiny: tuple[str, ...]) -> None:
    result = say("--plugins", "pipefusion", *tiny, "height=33", "pipefusion.warmup=-1", "timeout=0")
    refused(result, 3, "height=33", "pipefusion.warmup=-1", "timeout=0.0 is too small")
    assert len(result.stderr.strip().splitlines()) == 3


def test_no_model(say: Say) -> None:
    refused(say("a fox"), 2, "no model; add model=NAME with one of cogvideox, ", "z_image, or auto.")


def test_unknown_model(say: Say) -> None:
    refused(say("model=sd33", "a fox"), 2, "unknown model 'sd33'", "did you mean sd3?")


def test_missing_folder(say: Say) -> None:
    refused(say("model=sd3", "model.path=./gone", "a fox"), 2, "/gone does not exist", "model_index.json")


def test_no_pipeline(say: Say, tmp_path: Path) -> None:
    refused(say("model=sd3", f"model.path={tmp_path}", "a fox"), 2, "is not a diffusers pipeline", "model_index.json")


def test_hub_out_of_reach(launch: Callable[..., object], tmp_path: Path) -> None:
    run = launch("model=sd3", "a fox", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hub"))
    code, out, err = run.wait()  # type: ignore[attr-defined]
    assert (code, out) == (2, "")
    assert "stabilityai/stable-diffusion-3-medium-diffusers in the local hub cache and on the hub" in err
    assert "model.path=DIR" in err and "model=emoji" in err and "Traceback" not in err


def test_truncated_weights(say: Say, tiny_sd3_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(tiny_sd3_folder, folder)
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(say("model=sd3", f"model.path={folder}", "a fox"), 2, str(file), "cut off, fetch it again")


def test_another_pipeline(say: Say, tiny_sd3_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(tiny_sd3_folder, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "FluxPipeline"}))
    refused(say("model=sd3", f"model.path={folder}", "a fox"), 2, "holds a FluxPipeline but model=sd3 needs")


def test_empty_prompt_file(say: Say, tiny: tuple[str, ...]) -> None:
    Path("empty.txt").write_text("\n  \n")
    refused(say(*tiny, "prompts=empty.txt"), 2, "prompts=empty.txt holds no prompt; write one on each line.")


def test_out_below_a_file(say: Say, tiny: tuple[str, ...]) -> None:
    Path("file").write_text("")
    refused(say(*tiny, "out=file/x.png"), 2, "out=file/x.png cannot be written", "file is a file, not a folder")


def test_out_is_a_folder_with_two_names(say: Say, tiny: tuple[str, ...]) -> None:
    Path("x-1.png").mkdir()
    refused(say(*tiny, "out=x.png", "a", "b"), 2, "x-1.png is a folder")


def test_missing_config(say: Say) -> None:
    refused(say("--config", "gone.yaml"), 2, "--config gone.yaml cannot be read: No such file", "give a YAML file")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("- a\n- b\n", "does not hold settings by name"),
        ("", "does not hold settings by name"),
        ("a: [1\n", "is not valid YAML"),
        ("steps: 3\nsteps: 4\n", "gives steps twice"),
        ("usp: {ulysses: 2}\nusp.ulysses: 4\n", "gives usp.ulysses twice"),
        ("usp: {ulysses: {x: 1}}\n", "nests too deep"),
        ("prompt: [[a]]\n", "prompt must be a list of plain values"),
    ],
)
def test_bad_config(say: Say, text: str, part: str) -> None:
    Path("c.yaml").write_text(text)
    refused(say("--config", "c.yaml"), 2, part)


def test_not_enough_gpus(say: Say, tiny: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xdit_core.machine.cuda_devices", lambda: 1)
    words = [w for w in tiny if w != "device=cpu"]
    result = say("--plugins", "usp", *words, "usp.ulysses=2", "a fox")
    assert result.exit_code == 2 and "2 processes need 2 GPUs and " in result.stderr
