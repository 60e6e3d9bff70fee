"""One queue before several gangs: takes jobs, hands each to a gang that is free, and tells whoever watches.

`xdit_launcher.serve.gangs.runner` has the threads that own the gangs.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from xdit_core.printable import printable
from xdit_launcher.gang.job import Event, GangEnded
from xdit_launcher.serve.events import (
    CLOSING,
    Current,
    JobEvent,
    Watch,
    Watchers,
    ending,
    waiting_of,
)
from xdit_launcher.serve.fairness import FairQueue, Pace, Waiting
from xdit_launcher.serve.gangs.replicas import Gangs
from xdit_launcher.serve.gangs.runner import BUSY, IDLE, STARTING, STATES, Runner
from xdit_launcher.serve.limits import ApiError, ServeSettings
from xdit_launcher.serve.operations import Labels, Log, Metrics, announce
from xdit_launcher.serve.records import CANCELLED, ENDED, FAILED, QUEUED, RUNNING, NewFile, NewJob, Outcome, StoredJob
from xdit_launcher.serve.store import Store

POLL = 0.5  # seconds between two looks at a gang that has nothing to do
RENEWAL = 0.1  # seconds between two looks at a gang that is renewed
TRIES = 2  # gangs that may end while they draw a job
BY_CLIENT = "the client cancelled the job."


class Dispatcher:
    """The queue and its gangs. Every public method may be called from any thread.

    Args:
        store: of the jobs.
        gangs: starts them.
        limits: of the server.
        log, metrics: where to say what happens.
    """

    def __init__(
        self,
        store: Store,
        gangs: Gangs,
        limits: ServeSettings,
        log: Log,
        metrics: Metrics,
    ) -> None:
        self.store, self.limits, self.log, self.metrics = store, limits, log, metrics
        self._wake = threading.Condition(threading.RLock())
        self._queue, self._pace = FairQueue(), Pace()
        self._running: dict[str, Current] = {}  # by id of the job
        self._watchers = Watchers()
        self._draining = self._ended = self._hurried = False
        self._gangs, self._peak = gangs, 0
        self._runners = [
            Runner(number, self, gangs.start, number >= gangs.replicas.least, limits.idle, limits.at_once)
            for number in range(gangs.replicas.most)
        ]
        announce(metrics)
        metrics.gauge("xdit_queue_jobs", "jobs that wait", lambda: float(len(self._queue)))
        metrics.gauge("xdit_running_jobs", "jobs that are drawn", lambda: float(len(self._running)))
        metrics.gauge("xdit_ready", "1 if a gang answers", lambda: float(self.ready))
        metrics.gauge("xdit_gangs", "gangs by state: resting, starting, idle, busy", self._gangs_by_state)
        metrics.gauge("xdit_gangs_loaded", "gangs that are loaded", self._loaded)
        metrics.gauge("xdit_peak_bytes", "the most memory that a rank has used", lambda: float(self._peak))
        metrics.gauge("xdit_gang_load_seconds", "of the model, by gang", self._load_seconds)
        waiting = store.recover()
        for job in store.waiting():
            self._queue.add(waiting_of(job))
        self.log.write("store opened", folder=store.folder, waiting=waiting)

    def start(self) -> None:
        """Begin to answer jobs."""
        for runner in self._runners:
            runner.start()

    @property
    def ready(self) -> bool:
        """Whether there is a gang that answers, and new jobs are taken."""
        return not self._draining and any(runner.answers for runner in self._runners)

    def _gangs_by_state(self) -> dict[Labels, float]:
        counts = Counter(runner.state for runner in self._runners)
        return {(("state", state),): float(counts[state]) for state in STATES}

    def _loaded(self) -> float:
        running = self._gangs.running()
        return float(sum(runner.answers for runner in self._runners) if running is None else running)

    def renew(self) -> None:
        """Start other gangs in the place of all that run, one after the other; jobs go on, and none is lost."""
        self.log.write("all gangs are renewed")
        try:
            if self._gangs.renew():
                return
            for runner in self._runners:
                gang = runner.gang
                if gang is None:
                    continue
                with self._wake:
                    runner.stale = True
                    self._wake.notify_all()
                while not self._draining and (runner.gang is gang or runner.state == STARTING):
                    self.pause(RENEWAL)
        except Exception as error:
            self.log.unexpected("the gangs could not be renewed", error)

    def _load_seconds(self) -> dict[Labels, float]:
        gangs = {runner.number: runner.gang for runner in self._runners}
        return {(("gang", str(number)),): gang.load_seconds for number, gang in gangs.items() if gang is not None}

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
                    retry_after=self._pace.until_end([self._queue.next_work], self._rests()) or 5,
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
            self._queue.add(waiting_of(job), {current.job.key for current in self._running.values()})
            self._wake.notify_all()
        self.log.write(
            "job accepted", job=job.id, kind=job.kind, key=job.key or None, prompt=str(job.request["prompt"])[:200]
        )
        return job, is_new

    def standing(self, job: StoredJob) -> dict[str, Any]:
        """Position in the queue, estimate of the seconds until the end, and progress of a job."""
        with self._wake:
            if current := self._running.get(job.id):
                return {"position": 0, "estimate": current.rest(self._pace), "progress": current.progress}
            order = self._queue.order()
            ids = [waiting.id for waiting in order]
            if job.id not in ids:
                return {"position": None, "estimate": None, "progress": None}
            position = ids.index(job.id) + 1
            estimate = self._pace.until_end([waiting.work for waiting in order[:position]], self._rests())
        return {"position": position, "estimate": estimate, "progress": None}

    def _rests(self) -> list[float]:
        """Seconds until each gang that answers is free."""
        rests = [current.rest(self._pace) or 0.0 for current in self._running.values()]
        return rests + [0.0] * (sum(runner.answers for runner in self._runners) - len(rests))

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
        current = self._running.get(id)
        if current is not None:
            if not current.started:
                return [JobEvent(QUEUED, {"position": 0}), *([JobEvent(CLOSING)] if self._ended else [])]
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
                self.end(id, Outcome(CANCELLED, reason))
            elif current := self._running.get(id):
                current.stop(reason)

    def forget(self, id: str) -> None:
        """End a job if it has not ended, and forget it with its files."""
        with self._wake:
            running = id in self._running
            self.cancel(id)
            if running:
                self.store.hide(id)
            else:
                self.store.remove(id)

    def drain(self) -> None:
        """Take no new job and begin no other; those that are drawn go on. Whoever waits on a connection is told."""
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
        """Wait, after `drain`, until the running jobs have ended and the ranks are gone.

        Returns:
            Whether that happened in time. What still runs is drawn again by the next server.
        """
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self._hurried:
            runner = next((runner for runner in self._runners if runner.has_gang), None)
            if runner is None:
                break
            runner.join(0.1)
        with self._wake:
            self._ended = True
            self._watchers.close()
        return not self._running

    def expire(self) -> None:
        """End the jobs whose deadline has passed."""
        now = time.time()
        with self._wake:
            for id in self._queue.expired(now):
                self._queue.remove(id)
                self.end(id, Outcome(FAILED, "the deadline passed while the job waited."))
            for current in self._running.values():
                if current.job.deadline is not None and current.job.deadline < now:
                    current.stop("the deadline passed while the job was drawn.", expired=True)

    # What follows is for the runners; see `xdit_launcher.serve.gangs.runner.Desk`.

    @property
    def draining(self) -> bool:
        """Whether no further job is to be begun."""
        return self._draining

    def wait_until_needed(self, runner: Runner) -> bool:
        """Wait until the gang of a runner is needed; that of a spare one, until more jobs wait than gangs are free.

        Returns:
            False if the server ends instead.
        """
        with self._wake:
            self._wake.wait_for(lambda: self._draining or not runner.spare or self._needs_more())
            if not self._draining:
                runner.state = STARTING
        return not self._draining

    def _needs_more(self) -> bool:
        free = sum(runner.state in (STARTING, IDLE) for runner in self._runners)
        return len(self._queue) > free

    def pause(self, seconds: float) -> None:
        """Wait, unless the server ends."""
        with self._wake:
            self._wake.wait_for(lambda: self._draining, seconds)

    def take(self, runner: Runner) -> Current | None:
        """The next job; None if there was none for a moment. The first gang that is free gets it, so that spare ones
        can end; one that draws already leaves it to any that is free."""
        with self._wake:
            waiting = self._next(runner)
            if waiting is None:
                self._wake.wait(POLL)
                waiting = self._next(runner)
            if waiting is None:
                return None
            try:
                job = self.store.find(waiting.id)
            except sqlite3.Error:
                self._queue.add(waiting)
                raise
            if job is None:
                return None
            runner.state = BUSY
            self._wake.notify_all()  # the next gang may take the next job
            current = self._running[job.id] = Current(job, waiting.work)
            return current

    def _next(self, runner: Runner) -> Waiting | None:
        """Take the next job of the queue, if no other gang should have it."""
        others = self._runners if runner.state == BUSY else self._runners[: runner.number]
        better = any(other.state == IDLE and other.answers for other in others)
        return None if better or self._draining else self._queue.take()

    def begin(self, current: Current) -> None:
        """Store that a job is drawn now, and tell whoever watches."""
        self.store.start(current.job.id)
        if current.job.started is None:
            self.metrics.observe("xdit_job_seconds", time.time() - current.job.created, phase="wait")
        self._watchers.tell(current.job.id, JobEvent(RUNNING))
        self._publish_positions()

    def tell(self, current: Current, event: Event) -> None:
        """Keep what happened, and tell whoever watches."""
        with self._wake:
            told = current.take(event)
            if told is not None:
                self._watchers.tell(current.job.id, told)
        if event.kind == "step":
            self.metrics.count("xdit_steps_total")
        elif event.kind == "started":
            self.metrics.count("xdit_jobs_begun_total", together=str(event.together or 1))
        elif event.kind == "done":
            self._peak = max(self._peak, event.peak)

    def measured(self, current: Current, seconds: Mapping[str, float]) -> None:
        """A job was drawn in so many seconds, by phase; ``run`` is all of it."""
        self._pace.measured(current.work, seconds["run"])
        for phase, value in seconds.items():
            self.metrics.observe("xdit_job_seconds", value, phase=phase)

    def release(self, current: Current) -> None:
        """A job is not drawn any more."""
        with self._wake:
            if self._running.get(current.job.id) is current:
                del self._running[current.job.id]

    def lost(self, current: Current, error: GangEnded) -> None:
        """The ranks ended while they had this job: it is tried once more."""
        job, first_line = current.job, printable((str(error.args[0]).splitlines() or [""])[0])
        if current.cancelled is not None:
            self.end(job.id, Outcome(FAILED if current.expired else CANCELLED, current.cancelled))
        elif current.started and job.tries + 1 >= TRIES:
            reason = f"the ranks ended {TRIES} times while they drew this job: {first_line}"
            self.end(job.id, Outcome(FAILED, reason))
        else:
            with self._wake:
                self.store.requeue(job.id, blamed=current.started)
                self.release(current)
                self._queue.add(waiting_of(job))
                self._publish_positions()
                self._wake.notify_all()
            self.log.write("job waits again", "warning", job=job.id, error=first_line)

    def broken(self, current: Current, error: Exception) -> None:
        """The end of a job could not be stored: say so, and go on."""
        id = current.job.id
        self.log.unexpected("a job could not be finished", error, job=id)
        reason = f"the result could not be stored ({type(error).__name__})."
        try:
            self.end(id, Outcome(FAILED, reason))
        except (OSError, sqlite3.Error):  # a later server draws it again
            self._watchers.tell(id, JobEvent(FAILED, {"error": reason, "refused": False}))

    def end(self, id: str, outcome: Outcome) -> None:
        """Store the end of a job, and tell whoever watches."""
        self.store.finish(id, outcome)
        status, error = outcome.status, outcome.error
        with self._wake:
            hidden = self.store.hidden(id)
            if hidden:
                self.store.remove(id)
            self._running.pop(id, None)  # whoever begins to watch now finds the end in the store
            self._watchers.tell(id, ending(outcome))
        self.metrics.count("xdit_jobs_total", outcome=status)
        self.log.write("job ended", "warning" if status == FAILED else "info", job=id, status=status, error=error)
