"""Real processes that fail: the right rank is blamed, in a few lines, at once, and nothing is left running."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xdit_core.testing.beats import step_of

Launch = Callable[..., Any]
TWO = ("--plugins", "usp,faulty", "usp.ulysses=2")


@pytest.mark.parametrize(
    ("how", "rank", "code", "part"),
    [
        ("raise", 1, 1, "ValueError: a number that is no number"),
        ("exit", 1, 3, "the process left with exit code 3 before its work was done"),
        ("kill", 0, 137, "killed by signal 9 (SIGKILL), often the kernel's out-of-memory killer"),
        ("allocator", 1, 137, "out of memory ("),
    ],
)
def test_the_right_rank_is_blamed(
    launch: Launch, tiny: tuple[str, ...], how: str, rank: int, code: int, part: str
) -> None:
    run = launch(*TWO, *tiny, f"faulty.how={how}", f"faulty.rank={rank}", "a red fox")
    found, out, err = run.wait()
    lines = err.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"rank {rank} of 2 on "))
    assert found == code, err
    assert out == ""
    assert "failed at: step 2 of 3" in lines[start] or "step 2 of 3)" in lines[start]
    assert part in lines[start + 1]
    assert f"rank{rank}.log" in lines[start + 2]
    assert len(lines) - start <= 5 and "Traceback" not in err
    assert run.none_left()
    if how == "raise":
        assert "a number that is no number" in (run.run_folder / "rank1.log").read_text()


def test_hang(launch: Launch, tiny: tuple[str, ...]) -> None:
    """The rank that computes for ever is blamed, not the one that waits for it."""
    run = launch(*TWO, *tiny, "faulty.how=hang", "timeout=12", "a red fox")
    code, _, err = run.wait()
    assert code == 1
    assert "rank 1 of 2 on " in err and "no rank made progress for 12 s and this one is behind" in err
    assert "xdit_faulty.py" in (run.run_folder / "rank1.log").read_text()  # its stack
    assert run.none_left()


def test_wrong_tensors(launch: Launch, tiny: tuple[str, ...], tiny_sd3_folder: Path, tmp_path: Path) -> None:
    """The launcher sees well-formed files; the ranks find that they hold something else."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "wrong"
    shutil.copytree(tiny_sd3_folder, folder)
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({f"other.{key}": value for key, value in load_file(file).items()}, file)
    words = [w for w in tiny if not w.startswith("model.path=")]
    run = launch("--plugins", "usp", *words, f"model.path={folder}", "usp.ulysses=2", "a red fox")
    code, out, err = run.wait()
    assert (code, out) == (2, ""), err
    assert str(folder) in err and "failed at: loading the model" in err
    assert run.none_left()


def test_interrupt_and_kill(launch: Launch, tiny: tuple[str, ...]) -> None:
    """Ctrl-C, SIGTERM and the death of the launcher: no process stays."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        run = launch(*TWO, *tiny, "faulty.how=hang", f"runs=runs/{number}", "a red fox")
        run_folder = run.folder / "runs" / str(int(number))
        end = time.monotonic() + 60
        while not any(run_folder.glob("*/rank1.beat")) and time.monotonic() < end:
            time.sleep(0.05)
        if number == signal.SIGINT:  # once in the middle of the work, else as early as can be
            time.sleep(0.1)
            while not step_of(next(run_folder.glob("*/rank1.beat"))) and time.monotonic() < end:
                time.sleep(0.05)
        assert len(run.left_over()) == 2
        started = time.monotonic()
        os.kill(run.process.pid, number)
        code, _, err = run.wait(10)
        assert time.monotonic() - started < 4
        assert code == (-9 if number == signal.SIGKILL else 130)
        assert ("interrupted" in err) == (number != signal.SIGKILL) and "Traceback" not in err
        assert run.none_left(10)
