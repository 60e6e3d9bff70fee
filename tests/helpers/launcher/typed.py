"""Commands as a user types them, and the ranks that they start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
from PIL import Image

USP = ("--plugins", "usp", "usp.ulysses=2", "usp.ring=1")
SMALL = ("model=emoji", "device=cpu", "steps=3", "red heart")


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


def rank_of(folder: Path, rank: int) -> psutil.Process:
    """The process of a rank of the run whose folder is in ``folder``."""
    for process in psutil.process_iter(["cmdline", "environ"]):
        words, environ = process.info["cmdline"] or [], process.info["environ"] or {}
        if str(folder) in " ".join(words) and environ.get("RANK") == str(rank) and "xdit_core.worker" in words:
            return process
    raise LookupError(f"rank {rank} does not run")
