"""Tells whether an error was caused by another rank, by missing memory or by a full disk. Without torch.

Such an error comes out of the code that happened to run, which is not at fault. Reports must not blame a plugin for it.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

from xdit_core.errors import XditError

LOST_PEER = (
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "timed out waiting",
    "application timeout",
    "nccl communicator was aborted",
    "watchdog caught collective operation timeout",
)
NO_MEMORY = ("defaultcpuallocator", "out of memory", "can't allocate memory", "cannot allocate memory")


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
