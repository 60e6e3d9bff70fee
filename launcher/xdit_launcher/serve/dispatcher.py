"""One thread owns the gang: it takes jobs out of the queue, follows them, and starts another gang when one ends."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from xdit_core.errors import RequestCancelled, UsageError, XditError
from xdit_core.printable import printable
from xdit_launcher.gang.job import Event, GangEnded, RequestFailed
from xdit_launcher.serve.events import (
    CLOSING,
    AnyGang,
    Current,
    JobEvent,
    Watch,
    Watchers,
    ending,
    waiting_of,
)
from xdit_launcher.serve.fairness import FairQueue, Pace
from xdit_launcher.serve.limits import ApiError, ServeSettings
from xdit_launcher.serve.media import files_of
from xdit_launcher.serve.operations import Log, Metrics, announce
from xdit_launcher.serve.records import CANCELLED, DONE, ENDED, FAILED, QUEUED, RUNNING, NewFile, NewJob, StoredJob
from xdit_launcher.serve.store import Store

POLL = 0.5  # seconds between two looks at a gang that has nothing to do
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0  # seconds before another gang is started
TRIES = 2  # gangs that may end while they draw a job
BY_CLIENT = "the client cancelled the job."


class Dispatcher:
    """The queue and the gang. Every public method may be called from any thread.

    Args:
        store: of the jobs.
        start_gang: starts a gang; raises XditError if it cannot.
        limits: of the server.
        log, metrics: where to say what happens.
    """

    def __init__(
        self, store: Store, start_gang: Callable[[], AnyGang], limits: ServeSettings, log: Log, metrics: Metrics
    ) -> None:
        self.store, self.limits, self.log, self.metrics = store, limits, log, metrics
        self._start_gang = start_gang
        self._wake = threading.Condition(threading.RLock())
        self._queue, self._pace = FairQueue(), Pace()
        self._current: Current | None = None
        self._gang: AnyGang | None = None
        self._watchers = Watchers()
        self._draining = self._ended = self._hurried = False
        announce(metrics)
        metrics.gauge("xdit_queue_jobs", "jobs that wait", lambda: float(len(self._queue)))
        metrics.gauge("xdit_running_jobs", "jobs that are drawn", lambda: float(self._current is not None))
        metrics.gauge("xdit_ready", "1 if the ranks answer", lambda: float(self.ready))
        metrics.gauge("xdit_gang_load_seconds", "of the model", lambda: getattr(self._gang, "load_seconds", 0.0))
        waiting = store.recover()
        for job in store.waiting():
            self._queue.add(waiting_of(job))
        self.log.write("store opened", folder=store.folder, waiting=waiting)
        self._thread = threading.Thread(target=self._run, name="xdit-dispatcher", daemon=True)

    def start(self) -> None:
        """Begin to answer jobs."""
        self._thread.start()

    @property
    def ready(self) -> bool:
        """Whether there is a gang that answers, and new jobs are taken."""
        gang = self._gang
        return gang is not None and gang.alive and not self._draining

    def accept(
        self, new: NewJob, inputs: tuple[NewFile, ...] = (), watch: Watch | None = None
    ) -> tuple[StoredJob, bool]:
        """Store a job and put it in the queue.

        Args:
            watch: is told of all that happens from the beginning on.

        Returns:
            The job, and whether it is new.

        Raises:
            ApiError: the queue is full, the server ends, or the name of the job belongs to another request.
        """
        with self._wake:
            if new.idempotency is not None and (earlier := self.store.named(new.key, new.idempotency)):
                if earlier.digest != new.digest:
                    raise ApiError(
                        "this Idempotency-Key was used for another request; give each request its own.",
                        409,
                        code="idempotency_key_reused",
                    )
                return earlier, False
            if self._draining:
                raise ApiError("the server is ending; try again when it is back.", 503, code="ending", retry_after=30)
            if len(self._queue) >= self.limits.queue:
                self.metrics.count("xdit_jobs_total", outcome="queue_full")
                raise ApiError(
                    f"{len(self._queue)} jobs wait already, which is the most that this server takes; try again later.",
                    429,
                    code="queue_full",
                    retry_after=self._pace.seconds(self._queue.next_work) or 5,
                )
            try:
                job, is_new = self.store.accept(new, inputs)
            except (OSError, sqlite3.Error) as error:
                self.log.unexpected("a job could not be stored", error)
                raise ApiError(
                    "the server cannot store jobs now; its disk may be full.", 503, retry_after=60
                ) from error
            if watch is not None:
                self._watchers.add(job.id, watch)
            self.metrics.count("xdit_jobs_total", outcome="accepted")
            self._queue.add(waiting_of(job), self._current.job.key if self._current else None)
            self._wake.notify_all()
        self.log.write(
            "job accepted", job=job.id, kind=job.kind, key=job.key or None, prompt=str(job.request["prompt"])[:200]
        )
        return job, is_new

    def standing(self, job: StoredJob) -> dict[str, Any]:
        """Position in the queue, estimate of the seconds until the end, and progress of a job."""
        with self._wake:
            if self._current is not None and self._current.job.id == job.id:
                return {"position": 0, "estimate": self._current.rest(self._pace), "progress": self._current.progress}
            order = self._queue.order()
            ids = [waiting.id for waiting in order]
            if job.id not in ids:
                return {"position": None, "estimate": None, "progress": None}
            position = ids.index(job.id) + 1
            ahead = [self._pace.seconds(waiting.work) for waiting in order[:position]]
            rest = self._current.rest(self._pace) if self._current else 0.0
        known = [seconds for seconds in (*ahead, rest) if seconds is not None]
        estimate = round(sum(known), 1) if len(known) == len(ahead) + 1 else None
        return {"position": position, "estimate": estimate, "progress": None}

    @contextlib.contextmanager
    def watching(self, id: str, loop: asyncio.AbstractEventLoop) -> Iterator[Watch]:
        """A `Watch` of a job while the block runs."""
        watch = Watch(loop)
        with self._wake:
            for event in self._snapshot(id):
                watch.put(event)
            self._watchers.add(id, watch)
        try:
            yield watch
        finally:
            self.unwatch(id, watch)

    def unwatch(self, id: str, watch: Watch) -> None:
        """Tell somebody no more."""
        self._watchers.remove(id, watch)

    def _snapshot(self, id: str) -> list[JobEvent]:
        """What is known of a job, as events."""
        current = self._current
        if current is not None and current.job.id == id:
            events = [JobEvent(RUNNING), *([current.step] if current.step else []), *current.previews]
            return [*events, *([JobEvent(CLOSING)] if self._ended else [])]
        job = self.store.find(id)
        if job is None:
            return [JobEvent(CANCELLED, {"error": BY_CLIENT})]
        if job.status in ENDED:
            return [ending(job)]
        closing = [JobEvent(CLOSING)] if self._ended else []
        return [JobEvent(QUEUED, {"position": self.standing(job)["position"]}), *closing]

    def _publish_positions(self) -> None:
        """Tell whoever watches a queued job where it stands now."""
        with self._wake:
            for position, waiting in enumerate(self._queue.order(), 1):
                if waiting.id in self._watchers:
                    self._watchers.tell(waiting.id, JobEvent(QUEUED, {"position": position}))

    def cancel(self, id: str, reason: str = BY_CLIENT) -> None:
        """End a job as soon as possible; it is not an error if it has ended."""
        with self._wake:
            if self._queue.remove(id):
                self._end(id, CANCELLED, reason)
            elif self._current is not None and self._current.job.id == id:
                self._stop_current(reason)

    def _stop_current(self, reason: str, expired: bool = False) -> None:
        current = self._current
        if current is not None and current.cancelled is None:
            current.cancelled, current.expired = reason, expired
            if current.asked is not None:
                current.asked.cancel()

    def forget(self, id: str) -> None:
        """End a job if it has not ended, and forget it with its files."""
        with self._wake:
            running = self._current is not None and self._current.job.id == id
            self.cancel(id)
            if running:
                self.store.hide(id)
            else:
                self.store.remove(id)

    def drain(self) -> None:
        """Take no new job and begin no other; the running one goes on. Whoever waits on a connection is told."""
        with self._wake:
            self._draining = True
            for waiting in self._queue.order():
                if waiting.attached:
                    self.cancel(waiting.id, "the server is ending; send the request again when it is back.")
            self._wake.notify_all()

    def hurry(self) -> None:
        """Let `wait` return at once."""
        self._hurried = True

    def wait(self, seconds: float) -> bool:
        """Wait, after `drain`, until the running job has ended and the ranks are gone.

        Returns:
            Whether that happened in time. What still runs is drawn again by the next server.
        """
        end = time.monotonic() + seconds
        while self._thread.is_alive() and self._gang is not None and time.monotonic() < end and not self._hurried:
            self._thread.join(0.1)
        with self._wake:
            self._ended = True
            self._watchers.close()
        return self._current is None

    def expire(self) -> None:
        """End the jobs whose deadline has passed."""
        now = time.time()
        with self._wake:
            for id in self._queue.expired(now):
                self._queue.remove(id)
                self._end(id, FAILED, "the deadline passed while the job waited.")
            deadline = self._current.job.deadline if self._current else None
            if deadline is not None and deadline < now:
                self._stop_current("the deadline passed while the job was drawn.", expired=True)

    # What follows runs in the thread of the dispatcher.

    def _run(self) -> None:
        pause = FIRST_PAUSE
        while not self._draining:
            try:
                gang = self._start_gang()
            except XditError as error:
                self.log.write("the ranks could not be started", "error", error=error, pause=pause)
            except Exception as error:
                self.log.unexpected("the ranks could not be started", error, pause=pause)
            else:
                self.metrics.count("xdit_gang_starts_total")
                self.log.write("the ranks are ready", load_seconds=gang.load_seconds)
                try:
                    if self._serve(gang):
                        pause = FIRST_PAUSE
                except Exception as error:  # such as a disk that cannot be read: jobs wait in memory
                    self.log.unexpected("jobs could not be read", error, pause=pause)
                if not self._draining:
                    self.metrics.count("xdit_gang_ends_total")
                    self.log.write("the ranks have ended", "error", error=gang.error, pause=pause)
            with self._wake:
                self._wake.wait_for(lambda: self._draining, pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _serve(self, gang: AnyGang) -> bool:
        """Answer jobs while the gang lives.

        Returns:
            Whether it has answered one.
        """
        self._gang, answered = gang, False
        try:
            while gang.alive:
                with self._wake:
                    if self._draining:
                        break
                    waiting = self._queue.take()
                    if waiting is None:
                        self._wake.wait(POLL)
                        continue
                    try:
                        job = self.store.find(waiting.id)
                    except sqlite3.Error:
                        self._queue.add(waiting)
                        raise
                    if job is None:
                        continue
                    current = self._current = Current(job, waiting.work)
                try:
                    answered = self._answer(gang, current) or answered
                except Exception as error:  # such as a full disk: the job ends, and the server goes on
                    self.log.unexpected("a job could not be finished", error, job=job.id)
                    reason = f"the result could not be stored ({type(error).__name__})."
                    try:
                        self._end(job.id, FAILED, reason)
                    except (OSError, sqlite3.Error):  # a later server draws it again
                        self._watchers.tell(job.id, JobEvent(FAILED, {"error": reason, "refused": False}))
                finally:
                    with self._wake:
                        self._current = None
        finally:
            gang.close()
            self._gang = None
        return answered

    def _answer(self, gang: AnyGang, current: Current) -> bool:
        """Draw a job.

        Returns:
            Whether the gang has answered it, in whatever way.
        """
        job, begun = current.job, time.time()
        self.store.start(job.id)
        self._watchers.tell(job.id, JobEvent(RUNNING))
        self._publish_positions()
        if job.started is None:
            self.metrics.observe("xdit_job_seconds", begun - job.created, phase="wait")
        settings = dict(job.request["settings"])
        try:
            asked = gang.submit([job.request["prompt"]], previews=int(job.request.get("previews", 0)), **settings)
            with self._wake:
                current.asked = asked
                if current.cancelled is not None:
                    asked.cancel()
            for event in asked.events():
                self._take(current, event)
            results = asked.result()
        except RequestCancelled:
            reason = current.cancelled or "the ranks were ended."
            self._end(job.id, FAILED if current.expired else CANCELLED, reason)
        except RequestFailed as error:
            self._end(job.id, FAILED, str(error), refused=error.refused)
        except UsageError as error:
            self._end(job.id, FAILED, str(error), refused=True)
        except GangEnded as error:
            self._gang_ended(current, error)
            return False
        else:
            seconds = results[0].seconds
            files = tuple(files_of(results, job.request, job.about))
            taken = time.time() - begun
            self._pace.measured(current.work, taken)
            for phase, value in {**seconds, "run": taken}.items():
                self.metrics.observe("xdit_job_seconds", value, phase=phase)
            self._end(job.id, DONE, seconds=seconds, files=files)
        return True

    def _take(self, current: Current, event: Event) -> None:
        """Keep what happened, and tell whoever watches."""
        with self._wake:
            told = current.take(event)
            if told is not None:
                self._watchers.tell(current.job.id, told)
        if event.kind == "step":
            self.metrics.count("xdit_steps_total")

    def _gang_ended(self, current: Current, error: GangEnded) -> None:
        """The ranks ended while they had this job: it is tried once more."""
        job, first_line = current.job, printable((str(error.args[0]).splitlines() or [""])[0])
        if current.cancelled is not None:
            self._end(job.id, FAILED if current.expired else CANCELLED, current.cancelled)
        elif current.started and job.tries + 1 >= TRIES:
            self._end(job.id, FAILED, f"the ranks ended {TRIES} times while they drew this job: {first_line}")
        else:
            with self._wake:
                self.store.requeue(job.id, blamed=current.started)
                self._current = None
                self._queue.add(waiting_of(job))
                self._publish_positions()
            self.log.write("job waits again", "warning", job=job.id, error=first_line)

    def _end(
        self,
        id: str,
        status: str,
        error: str | None = None,
        *,
        refused: bool = False,
        seconds: Mapping[str, float] | None = None,
        files: tuple[NewFile, ...] = (),
    ) -> None:
        """Store the end of a job, and tell whoever watches."""
        self.store.finish(id, status, error, refused=refused, seconds=seconds, files=files)
        with self._wake:
            hidden = self.store.hidden(id)
            if hidden:
                self.store.remove(id)
            self._watchers.tell(id, JobEvent(status, {} if error is None else {"error": error, "refused": refused}))
        self.metrics.count("xdit_jobs_total", outcome=status)
        self.log.write("job ended", "warning" if status == FAILED else "info", job=id, status=status, error=error)
