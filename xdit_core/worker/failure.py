"""What a rank tells of its failure: who is to blame is decided from these files. Without torch."""

from __future__ import annotations

import errno
import os
import socket
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xdit_core.errors import XditError

WRITING = "writing "  # what a rank says before a path
HOST_VARIABLE = "XDIT_HOST"  # variable with the name by which the user knows this machine
OUT_OF_MEMORY = 137  # what a shell reports for a process that the kernel's out-of-memory killer ended
LOST_PEER = (
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "timed out waiting",
    "application timeout",
)
NO_MEMORY = ("defaultcpuallocator", "out of memory", "can't allocate memory", "cannot allocate memory")


def error_path(folder: Path, rank: int) -> Path:
    """Where a rank tells of its failure."""
    return folder / f"rank{rank}.error.json"


def chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was raised from."""
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)


def lost_peer(error: BaseException) -> bool:
    """Another rank went away or did not answer: this rank is not the cause."""
    if isinstance(error, XditError):
        return False
    for e in chain(error):
        names = {cls.__name__ for cls in type(e).__mro__}
        if names & {"DistNetworkError", "DistStoreError", "DistBackendError"}:
            return True
        if isinstance(e, RuntimeError) and any(words in str(e).lower() for words in LOST_PEER):
            return True
    return False


def no_memory(error: BaseException) -> bool:
    """Memory ran out."""
    return any(isinstance(e, MemoryError) or any(words in str(e).lower() for words in NO_MEMORY) for e in chain(error))


def full_disk(error: BaseException) -> OSError | None:
    """The error that says that a disk is full."""
    return next((e for e in chain(error) if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT)), None)


def fault_of_machine(error: BaseException) -> bool:
    """Another rank, the memory or the disk is at fault, and not the code that met it."""
    return lost_peer(error) or no_memory(error) or full_disk(error) is not None


def failure(error: BaseException, rank: int, doing: str) -> dict[str, Any]:
    """What the launcher needs for its report.

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
        where = full.filename or (doing.removeprefix(WRITING) if doing.startswith(WRITING) else "a file")
        message, known = (
            f"{where} cannot be written: {full.strerror}; make room, or choose another disk with out=.",
            True,
        )
    return {
        "rank": rank,
        "host": os.environ.get(HOST_VARIABLE) or socket.gethostname(),
        "doing": doing,
        "type": type(error).__name__,
        "message": message,
        "known": known,
        "victim": code != OUT_OF_MEMORY and not isinstance(error, SystemExit) and lost_peer(error),
        "exit_code": code,
        "monotonic": time.monotonic(),
        "wall": time.time(),
        "traceback": "".join(traceback.format_exception(error)),
    }
