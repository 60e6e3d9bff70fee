"""Runs that write files, as a user starts them: what was there, what is left to draw, and who writes what."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Launch = Callable[..., Any]


def test_after_a_failure_it_is_said_what_there_is_and_resume_draws_the_rest(
    launch: Launch, tiny: tuple[str, ...]
) -> None:
    """The third of three prompts fails; the run is started again, and draws that one alone."""
    words = (*tiny, "a", "b", "c", "out=o")
    run = launch("--plugins", "faulty", *words, "faulty.rank=0", "faulty.step=8")  # 3 steps a prompt
    code, out, err = run.wait()
    assert code != 0 and err.endswith("2 of 3 are in o/; resume=yes draws the rest\n"), err
    folder = run.folder / "o"
    times = {name: (folder / name).stat().st_mtime_ns for name in ("a-0.png", "b-0.png")}
    code, out, err = launch(*words, "resume=yes").wait()  # with other plugins: other pictures
    assert (
        code == 0
        and "0 of 3 are there with these settings; drawing 3\nreplacing o/a-0.png and o/b-0.png; overwrite=no" in err
    )
    assert times != {name: (folder / name).stat().st_mtime_ns for name in times}
    times = {name: (folder / name).stat().st_mtime_ns for name in times}
    (folder / "c-0.png").unlink()
    code, out, err = launch(*words, "resume=yes", "overwrite=no").wait()
    assert code == 0 and "2 of 3 are there with these settings; drawing 1" in err
    assert [line.split()[0] for line in out.splitlines()] == ["o/c-0.png", "o/sheet.png"]
    assert times == {name: (folder / name).stat().st_mtime_ns for name in times}
    code, out, err = launch(*words, "overwrite=no").wait()
    assert code == 2 and err.startswith("overwrite=no and o/a-0.png, o/b-0.png and o/c-0.png are there; choose another")


def test_what_there_is_after_an_interruption(launch: Launch, tiny: tuple[str, ...]) -> None:
    run = launch(
        "--plugins", "faulty", *tiny, "a", "b", "out=x.png", "faulty.rank=0", "faulty.step=5", "faulty.how=hang"
    )
    end = time.monotonic() + 60
    while not (run.folder / "fault-time").exists() and time.monotonic() < end:
        time.sleep(0.1)
    run.process.send_signal(signal.SIGINT)
    code, _, err = run.wait()
    assert code == 130 and err.endswith(
        "interrupted; every process has ended.\n1 of 2 is in ./; resume=yes draws the rest\n".replace(
            "1 of 2 are", "1 of 2 is"
        )
    )


def test_a_plan_started_by_hand(launch: Launch, tiny: tuple[str, ...], tmp_path: Path) -> None:
    """Its folder is made; where that cannot be, it is said before anything is loaded."""
    _, out, _ = launch("--dry-run", "--json", *tiny, "a fox", "out=new/deep/").wait()
    plan = tmp_path / "plan.json"
    plan.write_text(out)
    worker = [sys.executable, "-m", "xdit_core.worker", str(plan)]
    done = subprocess.run(worker, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "new" / "deep" / "a-fox-0.png").is_file(), done.stderr
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "new").write_text("")
    done = subprocess.run(worker, cwd=tmp_path / "elsewhere", capture_output=True, text=True)
    assert done.returncode == 2 and "out=new/deep/ cannot be written: new is a file, not a folder" in done.stderr


def test_a_dry_run_lists_every_file(launch: Launch, tiny: tuple[str, ...]) -> None:
    run = launch("--dry-run", *tiny, *"abcdefghijkl", "out=o")
    (run.folder / "o").mkdir()
    (run.folder / "o" / "a-0.json").write_text(json.dumps({"theirs": 1}))
    _, out, _ = run.wait()
    listed = [line.split()[1] for line in out.splitlines() if line.startswith("writes")]
    assert (
        len(listed) == 25
        and listed[:4] == ["o/a-0.png", "o/a-0.png.json", "o/b-0.png", "o/b-0.json"]
        and listed[-1] == "o/sheet.png"
    )
    assert os.listdir(run.folder / "o") == ["a-0.json"]
