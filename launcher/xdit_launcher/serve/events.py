"""What happens to jobs, for those who watch them, and what the dispatcher knows of the job that is drawn. Without
torch."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from xdit_core.errors import XditError
from xdit_launcher.gang.job import Event, Result
from xdit_launcher.serve.fairness import Pace, Waiting
from xdit_launcher.serve.records import ENDED, Outcome, StoredJob

CLOSING = "closing"  # kind of the last event of a watcher when the server ends


class AnyJob(Protocol):
    """What a dispatcher needs of a ``Job``."""

    def cancel(self) -> None:
        """End it as soon as possible."""

    def events(self) -> Iterator[Event]:
        """Yield what happens, from the beginning to the end."""

    def result(self) -> list[Result]:
        """Wait for the end, and return what each prompt gave."""


class AnyGang(Protocol):
    """What a dispatcher needs of a ``Gang``."""

    load_seconds: float

    @property
    def alive(self) -> bool:
        """Whether the ranks are ready for requests."""

    @property
    def error(self) -> XditError | None:
        """Why the ranks have ended."""

    def submit(self, prompts: Any, *, previews: int = 0, **settings: Any) -> AnyJob:
        """Put a request in the queue."""

    def close(self) -> None:
        """End the ranks."""


@dataclass(frozen=True)
class JobEvent:
    """Something that happened to a job, as its watchers see it.

    Args:
        kind: a status, or ``encoding``, ``step``, ``preview`` or ``closing``.
        data: ``position``, ``step``, ``steps``, ``number`` and ``error``, where they apply.
        picture: PNG of a preview.
    """

    kind: str
    data: Mapping[str, Any] = field(default_factory=dict)
    picture: bytes = b""

    @property
    def last(self) -> bool:
        """Whether nothing more will come."""
        return self.kind in (*ENDED, CLOSING)


class Watch:
    """The events of a job for one coroutine, from a snapshot of what is known on.

    Args:
        loop: in which the coroutine runs.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop, self._queue = loop, asyncio.Queue[JobEvent]()

    def put(self, event: JobEvent) -> None:
        """Add an event, from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody watches any more
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)

    async def next(self, seconds: float) -> JobEvent | None:
        """The next event, None if nothing happens for so long."""
        try:
            return await asyncio.wait_for(self._queue.get(), seconds)
        except TimeoutError:
            return None


@dataclass
class Current:
    """The job that is drawn.

    Args:
        job: as stored.
        work: as of `Waiting`.
        cancelled: why somebody wants it to end, None if nobody does.
        expired: its deadline is that reason.
    """

    job: StoredJob
    work: float
    asked: AnyJob | None = None
    cancelled: str | None = None
    expired: bool = False
    started: bool = False
    step: JobEvent | None = None
    previews: list[JobEvent] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def has(self, asked: AnyJob) -> None:
        """A gang has it."""
        with self._lock:
            self.asked = asked
            if self.cancelled is not None:
                asked.cancel()

    def stop(self, reason: str, expired: bool = False) -> None:
        """End it as soon as possible."""
        with self._lock:
            if self.cancelled is None:
                self.cancelled, self.expired = reason, expired
                if self.asked is not None:
                    self.asked.cancel()

    @property
    def fraction(self) -> float:
        """How much of it is done."""
        return 0.0 if self.step is None else self.step.data["step"] / max(1, self.step.data["steps"])

    @property
    def progress(self) -> dict[str, Any]:
        """How far it is, for clients."""
        step = self.step.data if self.step else {"step": 0, "steps": None}
        return {"step": step["step"], "steps": step["steps"], "fraction": round(self.fraction, 3)}

    def rest(self, pace: Pace) -> float | None:
        """Estimate of the seconds until it has ended, None if nothing was measured yet."""
        seconds = pace.seconds(self.work)
        return None if seconds is None else round(seconds * (1 - self.fraction), 1)

    def take(self, event: Event) -> JobEvent | None:
        """Keep what happened.

        Returns:
            What watchers are told, None if nothing.
        """
        told = JobEvent(event.kind, {"number": event.number, "step": event.step, "steps": event.steps}, event.data)
        if event.kind == "started":
            self.started = True
        elif event.kind == "step":
            self.step = told
        elif event.kind == "preview":
            self.previews.append(told)
        return told if event.kind in ("encoding", "step", "preview") else None


class Watchers:
    """The watches of all jobs. Every method may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watches: dict[str, list[Watch]] = {}

    def __contains__(self, id: str) -> bool:
        return id in self._watches

    def add(self, id: str, watch: Watch) -> None:
        """Begin to tell somebody of a job."""
        with self._lock:
            self._watches.setdefault(id, []).append(watch)

    def remove(self, id: str, watch: Watch) -> None:
        """Tell somebody no more."""
        with self._lock:
            self._watches[id].remove(watch)
            if not self._watches[id]:
                del self._watches[id]

    def tell(self, id: str, event: JobEvent) -> None:
        """Tell all who watch a job."""
        with self._lock:
            for watch in self._watches.get(id, ()):
                watch.put(event)

    def close(self) -> None:
        """Tell everybody that the server ends."""
        with self._lock:
            for watches in self._watches.values():
                for watch in watches:
                    watch.put(JobEvent(CLOSING))


def waiting_of(job: StoredJob) -> Waiting:
    """A job as the queue sees it."""
    work = float(job.about.get("work", 1.0))
    return Waiting(job.id, job.number, job.key, job.priority, job.deadline, work, job.attached)


def ending(job: StoredJob | Outcome) -> JobEvent:
    """The last event of a job that has ended."""
    return JobEvent(job.status, {} if job.error is None else {"error": job.error, "refused": job.refused})
