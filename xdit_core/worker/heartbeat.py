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
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from xdit_core.observe.observer import Awaited, Observer
from xdit_core.observe.status import STARTING, Status

if TYPE_CHECKING:
    from xdit_core.plan import Plan
    from xdit_core.points.request import Job

SIZE = 512
HEAD = struct.Struct("<IQdIH")  # checksum of the rest, count of beats, time.monotonic(), results written, bytes of JSON
READS = 5  # of a file that is being written to
AHEAD = 2  # steps that the host may be ahead of the device: enough to keep the device busy
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


class Mark(Protocol):
    """A place in the work of a device, such as ``torch.cuda.Event``."""

    def query(self) -> bool:
        """Whether the device has come to it."""

    def synchronize(self) -> Any:
        """Wait until it has."""


class Pace(Observer):
    """Waits behind each step until the device has done the step that is ``AHEAD`` steps back.

    A program that uses a GPU only queues work, and may be many steps ahead of a GPU that stands still. So its
    heartbeats would tell what it has queued.

    Args:
        mark: makes a mark behind the work that was queued so far.
        beat: told while this rank waits for its device.
    """

    def __init__(self, mark: Callable[[], Mark], beat: Observer) -> None:
        self._mark, self._beat = mark, beat
        self._marks: deque[tuple[int, Mark]] = deque()

    def job_started(self, job: Job) -> None:
        """Forget the marks of another call of the pipeline."""
        self._marks.clear()

    def step_done(self, step: int, steps: int) -> None:
        """Mark the end of a step, and wait for that of an earlier one."""
        self._marks.append((step, self._mark()))
        if len(self._marks) <= AHEAD:
            return
        earlier, mark = self._marks.popleft()
        if not mark.query():
            with self._beat.waiting(Awaited(f"its device to finish step {earlier}", "device")):
                mark.synchronize()


def pace_of(plan: Plan, beat: Observer) -> Pace | None:
    """The observer for the device of a plan; None on a CPU, which does its work when it is asked."""
    if plan.device != "cuda":
        return None

    def mark() -> Mark:
        import torch

        event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        made: Mark = event
        return made

    return Pace(mark, beat)
