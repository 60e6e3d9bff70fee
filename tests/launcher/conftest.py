from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from helpers.launcher import FAULTY
from xdit_launcher.cli import cli


@dataclass
class LaunchedCommand:
    """A launcher process and where it works."""

    process: subprocess.Popen[str]
    folder: Path

    @property
    def run_folder(self) -> Path:
        return next((self.folder / "runs").iterdir())

    def wait(self, seconds: float = 60) -> tuple[int, str, str]:
        try:
            out, err = self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        return self.process.returncode, out, err

    def left_over(self) -> list[str]:
        """Workers of this run that still live."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    command = (entry / "cmdline").read_text()
                    state = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
                except OSError:
                    continue
                if str(self.folder) in command and "xdit_core.worker" in command and state != "Z":
                    found.append(entry.name)
        return found

    def none_left(self, seconds: float = 2) -> bool:
        end = time.monotonic() + seconds
        while self.left_over():
            if time.monotonic() > end:
                return False
            time.sleep(0.05)
        return True


@pytest.fixture
def launch(tmp_path: Path) -> Callable[..., LaunchedCommand]:
    """Start the launcher as a user does, in a folder of its own; the faulty plugin is installed."""
    folder = tmp_path / "work"
    folder.mkdir()
    started: list[LaunchedCommand] = []

    def start(*words: str, **env: str) -> LaunchedCommand:
        path = os.pathsep.join([str(FAULTY), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)
        process = subprocess.Popen(
            [sys.executable, "-m", "xdit_launcher.cli", *words],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": path, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(LaunchedCommand(process, folder))
        return started[-1]

    yield start
    for run in started:
        if run.process.poll() is None:
            run.process.kill()
            run.process.wait()


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Result]:
    """Run the command line in this process, in an empty folder, where starting a process is an error."""

    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", forbidden)
    monkeypatch.syspath_prepend(str(FAULTY))
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> Result:
        return CliRunner().invoke(cli, list(words))

    return run


@pytest.fixture
def tiny(tiny_sd3_folder: Path) -> tuple[str, ...]:
    """The words that choose a tiny checkpoint with 4 heads, 4 blocks and 8 x 8 tokens."""
    return ("model=sd3", f"model.path={tiny_sd3_folder}", "steps=3", "max_sequence_length=5", "device=cpu")
