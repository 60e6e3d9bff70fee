"""A rank's sign of life: a small file in the run folder that says when it last moved and what it is doing.

The file is mapped into memory: a beat costs microseconds and outlives the process. Without torch: the launcher reads
it.
"""

from __future__ import annotations

import mmap
import struct
import time
from dataclasses import dataclass
from pathlib import Path

SIZE = 512
HEAD = struct.Struct("<QdIH")  # count of beats, time.monotonic(), results written, bytes of text
WAITING = "waiting"


@dataclass(frozen=True)
class Heartbeat:
    """What a beat file says.

    Args:
        count: beats so far; a rank whose count stands still does not move.
        at: ``time.monotonic()`` of the last beat, comparable on one machine only.
        doing: the last words.
        written: results that are where they should be.
    """

    count: int
    at: float
    doing: str
    written: int = 0

    @property
    def waiting(self) -> bool:
        """It was about to wait for other ranks."""
        return self.doing.startswith(WAITING)


def heartbeat_path(folder: Path, rank: int) -> Path:
    """The beat file of a rank."""
    return folder / f"rank{rank}.beat"


class HeartbeatWriter:
    """Writes the beats of one rank.

    Args:
        path: its file; None, or a path that cannot be written: beats are only remembered.
    """

    def __init__(self, path: Path | None) -> None:
        self.count, self.now, self._phase = 0, "starting", "starting"
        self.written = 0
        self._map: mmap.mmap | None = None
        if path is not None:
            try:
                path.write_bytes(bytes(SIZE))
                with path.open("r+b") as file:
                    self._map = mmap.mmap(file.fileno(), SIZE)
            except OSError:
                self._map = None
        self.doing(self.now)

    def doing(self, text: str) -> None:
        """Say what the rank does from now on. A wait is shown with the phase in which it happens; "" ends it."""
        if text.startswith(WAITING):
            self.now = f"{text} ({self._phase})"
        else:
            self.now = self._phase = text or self._phase
        self.count += 1
        self._put()

    def wrote(self, results: int) -> None:
        """So many more results are where they should be."""
        self.written += results
        self._put()

    def _put(self) -> None:
        if self._map is None:
            return
        data = self.now.encode("utf-8", "replace")[: SIZE - HEAD.size]
        # one slice assignment: a reader sees an old or a new beat, or at worst a mixture of two lines of text
        self._map[: HEAD.size + len(data)] = HEAD.pack(self.count, time.monotonic(), self.written, len(data)) + data


def read_heartbeat(path: Path) -> Heartbeat | None:
    """The last beat in a file, None if there is none yet."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    if len(data) < HEAD.size:
        return None
    count, at, written, length = HEAD.unpack_from(data)
    if not count:
        return None
    return Heartbeat(count, at, data[HEAD.size : HEAD.size + length].decode("utf-8", "replace"), written)
