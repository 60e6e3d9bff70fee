"""The file in which a rank reports its failure; the launcher finds the root cause from these files. Without torch."""

from __future__ import annotations

import time
import traceback
from pathlib import Path
from typing import Any

from xdit_core.errors import XditError
from xdit_core.faults import full_disk, lost_peer, no_memory
from xdit_core.machine import host_name
from xdit_core.observe.status import Phase, Status

OUT_OF_MEMORY = 137  # what a shell reports for a process that the kernel's out-of-memory killer ended


def error_path(folder: Path, rank: int) -> Path:
    """Return the path of the failure file of a rank."""
    return folder / f"rank{rank}.error.json"


def failure(error: BaseException, rank: int, status: Status) -> dict[str, Any]:
    """Return what the launcher needs for its report.

    Args:
        status: what the rank was doing.

    Returns:
        Among others ``known`` (the message is a sentence for the user), ``victim`` (see ``lost_peer``) and
        ``exit_code``.
    """
    message, code = str(error).strip() or type(error).__name__, 1
    known = isinstance(error, XditError)
    if isinstance(error, XditError):
        code = error.exit_code
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) and error.code else 1
        message, known = f"the process left with exit code {error.code} before its work was done", True
    if no_memory(error):
        code, known = OUT_OF_MEMORY, True
        message = (
            f"out of memory ({message.splitlines()[0][:160]}); lower height, width or images, use dtype=bfloat16, "
            "or divide the model over more processes with --plugins pipefusion."
        )
    if full := full_disk(error):
        where = full.filename or (status.detail if status.phase == Phase.WRITING else "a file")
        message, known = (
            f"{where} cannot be written: {full.strerror}; make room, or choose another disk with out=.",
            True,
        )
    return {
        "rank": rank,
        "host": host_name(),
        "status": status.to_dict(),
        "type": type(error).__name__,
        "message": message,
        "known": known,
        "victim": code != OUT_OF_MEMORY and not isinstance(error, SystemExit) and lost_peer(error),
        "exit_code": code,
        "monotonic": time.monotonic(),
        "wall": time.time(),
        "traceback": "".join(traceback.format_exception(error)),
    }
