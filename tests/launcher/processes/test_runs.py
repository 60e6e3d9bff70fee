"""Runs that go well, started as a user starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Launch = Callable[..., Any]


def test_two_ranks_draw_what_one_draws(launch: Launch, tiny: tuple[str, ...]) -> None:
    """Serial into a folder; on two ranks into files; the pictures are equal."""
    import numpy as np
    from PIL import Image

    serial = launch(*tiny, "a red fox", "blue heart", "out=serial", "seed=7", "images=2")
    code, out, err = serial.wait()
    assert code == 0, err
    names = ["a-red-fox-7.png", "a-red-fox-8.png", "blue-heart-7.png", "blue-heart-8.png"]
    assert [line.split()[0] for line in out.splitlines()] == [f"serial/{name}" for name in (*names, "sheet.png")]
    assert "one process" in err.splitlines()

    two = launch(
        "--plugins", "usp", "a red fox", *tiny, "blue heart", "usp.ulysses=2", "out=two.png", "seed=7", "images=2"
    )
    code, out, err = two.wait()
    assert code == 0, err
    assert [line.split()[0] for line in out.splitlines()] == [*(f"two-{i}.png" for i in range(4)), "two-sheet.png"]
    assert "2 processes: ulysses 2" in err and "step 3/3" in err
    folder = serial.folder
    for i, name in enumerate(names):
        a, b = (np.asarray(Image.open(folder / p)).astype(int) for p in (f"serial/{name}", f"two-{i}.png"))
        assert a.shape == (32, 32, 3) and abs(a - b).max() <= 1

    inside = Image.open(folder / "two-1.png").text  # type: ignore[attr-defined]
    beside = json.loads((folder / "two-1.json").read_text())
    assert json.loads(inside["xdit"])["seed"] == beside["seed"] == 8
    assert "Steps: 3" in inside["parameters"] and inside["parameters"].startswith("a red fox\n")
    assert set(beside["seconds"]) == {"load", "encode", "denoise", "decode"}
    assert beside["plan"]["axes"] == {"ring": 1, "ulysses": 2} and beside["prompt"] == "a red fox"
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]
    kept = sorted(p.name for p in max((folder / "runs").iterdir(), key=lambda p: p.stat().st_mtime).iterdir())
    assert kept == ["command.json", "plan.json", "rank0.beat", "rank0.log", "rank1.beat", "rank1.log"]
    assert two.none_left()


def test_finished_pictures_survive_a_later_failure(launch: Launch, tiny: tuple[str, ...]) -> None:
    """Latents of the sample prompt are written although the second prompt fails; the config file names the plugins."""
    from safetensors import safe_open

    run = launch("--config", "c.yaml", *tiny, "faulty.step=4", "a", "b")  # 3 steps a prompt
    (run.folder / "c.yaml").write_text(
        "plugins: [faulty]\nfaulty: {rank: 0, how: raise}\noutput_type: latent\nout: kept\n"
    )
    code, out, err = run.wait()
    assert code != 0 and "ValueError" in err
    assert out.split()[0] == "kept/a-0.safetensors"
    with safe_open(run.folder / "kept" / "a-0.safetensors", "pt") as file:
        assert file.get_slice("latents").get_shape() == [1, 4, 16, 16]
        assert json.loads(file.metadata()["xdit"])["prompt"] == "a"
    assert not (run.folder / "kept" / "b-0.safetensors").exists()


def test_worker_under_torchrun(tmp_path: Path, tiny: tuple[str, ...]) -> None:
    """Any launcher that sets the usual variables can start a plan."""
    words = ["--plugins", "usp", "usp.ulysses=2", *tiny, "a red fox", f"out={tmp_path / 'x.png'}"]
    plan = subprocess.run(
        [sys.executable, "-m", "xdit_launcher.cli", "run", "--dry-run", "--json", *words],
        capture_output=True,
        check=True,
    )
    file = tmp_path / "plan.json"
    file.write_bytes(plan.stdout)
    rendezvous = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node=2",
            *rendezvous,
            "-m",
            "xdit_core.worker",
            str(file),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "x.png").is_file() and "x.png" in done.stdout


def test_worker_alone_refuses_a_plan_for_two(tmp_path: Path, tiny: tuple[str, ...]) -> None:
    from xdit_core.planning.planner import make_plan
    from xdit_core.settings import parse_words

    plan = make_plan(["usp"], parse_words([*tiny, "usp.ulysses=2", "prompt=a"]))
    (tmp_path / "plan.json").write_text(plan.to_json())
    done = subprocess.run(
        [sys.executable, "-m", "xdit_core.worker", str(tmp_path / "plan.json")], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "the plan needs 2 processes but WORLD_SIZE is 1; start it with torchrun --nproc-per-node 2" in done.stderr


def test_pictures_drawn_on_several_ranks_are_all_written_and_named(launch: Launch, tiny: tuple[str, ...]) -> None:
    """Three pictures over two ranks; latents of one prompt, half of them from another rank."""
    from safetensors.torch import load_file

    code, out, err = (
        run := launch("--plugins", "dp", *tiny, "a red fox", "out=fox.png", "seed=7", "images=3", "dp.degree=2")
    ).wait()
    assert code == 0, err
    assert [line.split()[0] for line in out.splitlines()] == ["fox-0.png", "fox-1.png", "fox-2.png", "fox-sheet.png"]
    assert json.loads((run.folder / "fox-2.json").read_text())["seed"] == 9
    words = (
        "--plugins",
        "dp",
        *tiny,
        "a red fox",
        "snow",
        "out=latents",
        "images=3",
        "dp.degree=2",
        "output_type=latent",
    )
    code, out, err = (run := launch(*words)).wait()
    assert code == 0, err
    assert [
        load_file(run.folder / f"latents/{n}-0.safetensors")["latents"].shape[0] for n in ("a-red-fox", "snow")
    ] == [3, 3]
