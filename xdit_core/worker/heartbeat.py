"""The heartbeat of a rank: a small file in the run folder with the time of its last progress and what it is doing.

The file is mapped into memory, so a beat costs microseconds and survives the process. Without torch, since the launcher
reads it.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import struct
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from xdit_core.observe.observer import Awaited, Observer
from xdit_core.observe.status import STARTING, Status

SIZE = 512
HEAD = struct.Struct("<IQdIH")  # checksum of the rest, count of beats, time.monotonic(), results written, bytes of JSON
READS = 5  # of a file that is being written to
MOST_PEERS = 32  # ranks that a beat names


@dataclass(frozen=True)
class Heartbeat:
    """The content of a heartbeat file.

    Args:
        count: number of beats so far; it stands still if the rank makes no progress.
        at: ``time.monotonic()`` of the last beat in seconds; comparable on one machine only.
        status: what the rank has been doing since then.
        written: number of results that were written to their own path.
    """

    count: int
    at: float
    status: Status
    written: int = 0


def heartbeat_path(folder: Path, rank: int) -> Path:
    """Return the path of the heartbeat file of a rank."""
    return folder / f"rank{rank}.beat"


class HeartbeatWriter(Observer):
    """Writes the heartbeat of one rank.

    Args:
        path: its file. With None, or if the path cannot be written, beats stay in memory.
    """

    def __init__(self, path: Path | None) -> None:
        self.count, self.written = 0, 0
        self.now = STARTING
        self._map: mmap.mmap | None = None
        if path is not None:
            try:
                path.write_bytes(bytes(SIZE))
                with path.open("r+b") as file:
                    self._map = mmap.mmap(file.fileno(), SIZE)
            except OSError:
                self._map = None
        self.status(self.now)

    def status(self, status: Status) -> None:
        """Write what the rank does from now on."""
        self.now = status
        self.count += 1
        self._put()

    @contextlib.contextmanager
    def waiting(self, awaited: Awaited) -> Iterator[None]:
        """Write what the rank waits for; after the wait, the status is again what it was before."""
        work = self.now
        peers = () if awaited.message is None else (awaited.message[1],)
        self.status(replace(work, waiting_for=awaited.what, axis=awaited.axis, peers=peers))
        yield
        self.status(work)

    def wrote(self, results: int) -> None:
        """Count results that were written to their own path."""
        self.written += results
        self._put()

    def _put(self) -> None:
        if self._map is None:
            return
        text = encoded(self.now)
        head = HEAD.pack(0, self.count, time.monotonic(), self.written, len(text))
        rest = head[4:] + text
        self._map[: 4 + len(rest)] = zlib.crc32(rest).to_bytes(4, "little") + rest


def encoded(status: Status) -> bytes:
    """Encode a status as JSON that fits into a heartbeat file; long texts are cut."""
    values = replace(status, peers=status.peers[:MOST_PEERS]).to_dict()
    while len(data := json.dumps(values, ensure_ascii=False).encode("utf-8", "replace")) > SIZE - HEAD.size:
        longest = max((name for name in values if isinstance(values[name], str)), key=lambda name: len(values[name]))
        values[longest] = values[longest][: len(values[longest]) * 3 // 4]
    return data


def read_heartbeat(path: Path) -> Heartbeat | None:
    """Read the last beat from a file; None if there is none yet, or if it is incomplete."""
    for _ in range(READS):
        try:
            data = path.read_bytes()
        except OSError:
            return None
        if len(data) < HEAD.size:
            return None
        checksum, count, at, written, length = HEAD.unpack_from(data)
        if not count and not checksum:
            return None
        if zlib.crc32(data[4 : HEAD.size + length]) == checksum:
            return Heartbeat(count, at, Status.from_dict(json.loads(data[HEAD.size : HEAD.size + length])), written)
    return None
