"""Commands as a user types them, and the ranks that they start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from xdit_launcher import Gang
from xdit_launcher.gang.job import GangEnded

USP = ("--plugins", "usp", "usp.ulysses=2", "usp.ring=1")
SMALL = ("model=emoji", "device=cpu", "steps=3", "threads=1", "red heart")


def xdit(
    folder: Path, *words: str, before: tuple[str, ...] = (), env: dict[str, str] | None = None, **more: str
) -> Any:
    """The command as a user types it."""
    command = [*before, sys.executable, "-P", "-m", "xdit_launcher.cli", *words]
    return subprocess.run(
        command, cwd=folder, env={**(env or os.environ), **more}, capture_output=True, text=True, timeout=120
    )


def pixels(path: Path) -> bytes:
    return Image.open(path).tobytes()


def lose_a_rank(gang: Gang, folder: Path, report: str) -> None:
    """Kill rank 1 of a gang while it draws: the gang ends with a report.

    Args:
        folder: in which its run folder is.
        report: a pattern for it.
    """
    job = gang.submit("red heart", steps=4000)
    next(event for event in job.events(timeout=60) if event.kind == "step")
    rank_of(folder, 1).kill()
    with pytest.raises(GangEnded, match=report):
        job.result(timeout=60)


def rank_of(folder: Path, rank: int) -> psutil.Process:
    """The process of a rank of the run whose folder is in ``folder``."""
    for process in psutil.process_iter(["cmdline", "environ"]):
        words, environ = process.info["cmdline"] or [], process.info["environ"] or {}
        if str(folder) in " ".join(words) and environ.get("RANK") == str(rank) and "xdit_core.worker" in words:
            return process
    raise LookupError(f"rank {rank} does not run")
