"""Run folders: each says what was run and when, old ones go, and nothing that somebody may want is deleted."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from PIL import Image

from xdit_core.observe.status import Phase, Status
from xdit_core.outputs import results
from xdit_core.planning.planner import make_plan
from xdit_core.points.request import Output
from xdit_core.settings import parse_words
from xdit_core.worker.heartbeat import HeartbeatWriter, heartbeat_path
from xdit_launcher.run_folders import COMMAND, may_run, note_end, queued, read_command, remove_old, run_folder


def old_run(parent: Path, n: int, **about: Any) -> Path:
    """A folder as run number ``n`` of long ago has left it."""
    folder = parent / f"20200101-0000{n:02}-sd3"
    folder.mkdir(parents=True)
    told = {
        "command": "xdit-launch",
        "host": socket.gethostname(),
        "process": 2**22 + 1,
        "started": "2020-01-01T00:00:00+00:00",
    }
    (folder / COMMAND).write_text(json.dumps({**told, "ended": "2020-01-01T00:01:00+00:00", **about}))
    for name in ("plan.json", "rank0.log", "rank0.error.json", "trace.json", "summary.txt", "timeline.png"):
        (folder / name).write_text("{}")
    HeartbeatWriter(heartbeat_path(folder, 0)).status(Status(Phase.DENOISING, step=2, steps=3))
    return folder


def rewrite(folder: Path, **about: Any) -> None:
    """Change what a run folder says of its run; None takes an entry away."""
    told = {**read_command(folder), **about}
    (folder / COMMAND).write_text(json.dumps({k: v for k, v in told.items() if v is not None}))


def test_the_newest_are_kept(tmp_path: Path) -> None:
    folders = [old_run(tmp_path, n) for n in range(5)]
    (folders[0] / "serial").mkdir()  # as verify leaves it
    for name in ("plan.json", "rank0.record.npz"):
        (folders[0] / "serial" / name).touch()
    assert remove_old(tmp_path, 0) == [] == remove_old(tmp_path, 5)
    assert remove_old(tmp_path, 2) == folders[:3]
    assert sorted(tmp_path.iterdir()) == folders[3:]


def test_a_number_behind_the_name_counts(tmp_path: Path) -> None:
    """Of the runs of one second the tenth is newer than the second."""
    first = old_run(tmp_path, 1)
    for n in (2, 10):
        old_run(tmp_path, 2).rename(tmp_path / f"{first.name}-{n}")
    assert [p.name for p in remove_old(tmp_path, 1)] == [first.name, f"{first.name}-2"]


def test_what_is_no_run_of_ours_stays(tmp_path: Path, tiny: tuple[str, ...]) -> None:
    """Guards against deleting what a user has put there, and pictures for which there was no room elsewhere."""
    mine, rescued, deep, linked, queue = [old_run(tmp_path / "runs", n) for n in range(5)]
    (mine / "notes.txt").write_text("mine")
    plan = make_plan([], parse_words([*tiny, "prompt=a fox"]))
    results.write(Output("a fox", images=[Image.new("RGB", (32, 32))]), 0, rescued / "fox.png", plan, {})
    (deep / "plan").mkdir()
    (deep / "plan" / "notes.txt").write_text("mine")
    (linked / "rank1.log").symlink_to(tmp_path / "elsewhere")
    with queued(queue, ends=False):
        pass
    (tmp_path / "elsewhere").write_text("mine")
    (tmp_path / "runs/20200101-000000-photos").mkdir()
    (tmp_path / "runs/20200101-000000-photos/a.png").touch()
    (tmp_path / "runs/20200101-000000-empty").mkdir()
    (tmp_path / "runs/notes").mkdir()
    away = old_run(tmp_path / "away", 1)
    (tmp_path / "runs" / away.name.replace("01-sd3", "09-sd3")).symlink_to(away)
    newest = old_run(tmp_path / "runs", 50)
    before = sorted(tmp_path.rglob("*"))
    assert remove_old(tmp_path / "runs", 1) == []
    assert sorted(tmp_path.rglob("*")) == before
    note_end(queue)
    assert remove_old(tmp_path / "runs", 1) == [queue] and newest.is_dir()


def test_verify_leaves_results_that_are_its_own(tmp_path: Path, tiny: tuple[str, ...]) -> None:
    folder = old_run(tmp_path, 1)
    plan = make_plan([], parse_words([*tiny, "prompt=a fox"]))
    results.write(Output("a fox", images=[Image.new("RGB", (32, 32))]), 0, folder / "plan/a-fox-0.png", plan, {})
    (folder / "plan" / "plan.json").touch()
    old_run(tmp_path, 2)
    assert remove_old(tmp_path, 1) == [folder]


def test_a_run_that_goes_on_stays(tmp_path: Path) -> None:
    folder = old_run(tmp_path, 1)
    os.utime(heartbeat_path(folder, 0), (0, 0))
    assert not may_run(folder)
    rewrite(folder, ended=None)
    assert may_run(folder)  # its rank has just moved
    HeartbeatWriter(heartbeat_path(folder, 0)).status(Status(Phase.DONE))
    assert not may_run(folder)
    rewrite(folder, host="another")  # whose processes are not to be seen from here
    assert may_run(folder)
    rewrite(folder, host=socket.gethostname(), process=os.getpid())  # a number that was another process' in 2020
    assert not may_run(folder)
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    rewrite(folder, process=process.pid, started=datetime.now().astimezone().isoformat())
    old_run(tmp_path, 2)
    assert may_run(folder) and remove_old(tmp_path, 1) == []
    process.communicate(b"\n")
    assert remove_old(tmp_path, 1) == [folder]


def test_a_folder_that_does_not_say_whose_it_is(tmp_path: Path) -> None:
    """As on another host, or of an earlier version: deleted after a day."""
    folder = old_run(tmp_path, 1)
    (folder / COMMAND).unlink()
    HeartbeatWriter(heartbeat_path(folder, 0)).status(Status(Phase.DONE))
    assert may_run(folder)
    for path in (*folder.iterdir(), folder):
        os.utime(path, (time.time() - 90000,) * 2)
    assert not may_run(folder)
    old_run(tmp_path, 2)
    assert remove_old(tmp_path, 1) == [folder]


def test_a_run_folder_says_what_was_run(tmp_path: Path, tiny: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plan = make_plan([], parse_words([*tiny, "prompt=a fox", "keep_runs=2"]))
    words = ["xdit-launch", "run", *tiny, "a fox's den"]
    for _ in range(4):
        with run_folder(plan, words) as folder:
            about = read_command(folder)
            assert shlex.split(about["command"]) == words and about["folder"] == str(tmp_path) and "ended" not in about
            assert abs(datetime.fromisoformat(about["started"]).timestamp() - time.time()) < 60
        assert datetime.fromisoformat(read_command(folder)["ended"]).tzinfo
    assert len(list((tmp_path / "runs").iterdir())) == 2 and folder.is_dir()


def test_the_command_line_as_typed(
    say: Callable[..., Result], tiny: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xdit_launcher.backends.registry.Backend.start", lambda *_: 0)
    assert say(*tiny, "a fox").exit_code == 0
    (folder,) = Path("runs").iterdir()
    assert shlex.split(read_command(folder)["command"])[1:] == ["run", *tiny, "a fox"]
    result = say("keep_runs=-1", *tiny, "a fox")
    assert result.exit_code == 3 and "keep_runs=-1 is too small; give 0 or more" in result.stderr
