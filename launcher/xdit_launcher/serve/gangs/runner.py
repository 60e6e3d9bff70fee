"""A thread that owns a gang: it takes jobs out of the queue, follows them, and starts another gang when one ends.
Without torch."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Protocol

from xdit_core.errors import RequestCancelled, UsageError, XditError
from xdit_launcher.gang.job import Event, GangEnded, RequestFailed
from xdit_launcher.serve.events import AnyGang, Current
from xdit_launcher.serve.media import files_of
from xdit_launcher.serve.operations import Log, Metrics
from xdit_launcher.serve.records import CANCELLED, DONE, FAILED, Outcome

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0  # seconds before another gang is started
PLACE = 0.2  # seconds between two looks whether a gang that has all the jobs it can have still lives
RESTING, STARTING, IDLE, BUSY = STATES = ("resting", "starting", "idle", "busy")


class Desk(Protocol):
    """Where runners get their jobs, and say what becomes of them."""

    log: Log
    metrics: Metrics

    @property
    def draining(self) -> bool:
        """Whether no further job is to be begun."""

    def wait_until_needed(self, runner: Runner) -> bool:
        """Wait until the gang of a runner is needed; False if the server ends instead."""

    def pause(self, seconds: float) -> None:
        """Wait, unless the server ends."""

    def take(self, runner: Runner) -> Current | None:
        """The next job; None if there was none for a moment."""

    def begin(self, current: Current) -> None:
        """Its gang gets a job now."""

    def tell(self, current: Current, event: Event) -> None:
        """Something happened to a job."""

    def end(self, id: str, outcome: Outcome) -> None:
        """A job has ended."""

    def lost(self, current: Current, error: GangEnded) -> None:
        """The ranks ended while they had a job."""

    def broken(self, current: Current, error: Exception) -> None:
        """The end of a job could not be stored."""

    def release(self, current: Current) -> None:
        """A job is not drawn any more."""

    def measured(self, current: Current, seconds: Mapping[str, float]) -> None:
        """A job was drawn in so many seconds, by phase; ``run`` is all of it."""


class Runner:
    """Owns one gang after the other.

    Args:
        number: counts the runners from 0.
        desk: where the jobs are.
        start_gang: as of ``Gangs.start``.
        spare: its gang runs only while it is needed.
        idle: seconds without a job after which a spare gang ends.
        at_once: how many jobs its gang has at the same time; what it cannot draw together waits there.

    Attributes:
        stale: another gang is to be started once the present one has drawn its job.
    """

    def __init__(
        self,
        number: int,
        desk: Desk,
        start_gang: Callable[[int, Callable[[], bool]], AnyGang],
        spare: bool = False,
        idle: float = 0.0,
        at_once: int = 1,
    ) -> None:
        self.number, self.spare = number, spare
        self.gang: AnyGang | None = None
        self.state, self.stale = RESTING, False
        self._desk, self._start_gang, self._longest_idle = desk, start_gang, idle
        self._places = threading.Semaphore(at_once)
        self._answered = False
        self._thread = threading.Thread(target=self._run, name=f"xdit-runner-{number}", daemon=True)

    def start(self) -> None:
        """Begin to answer jobs."""
        self._thread.start()

    def join(self, seconds: float) -> None:
        """Wait until the gang is gone and will not come back, or so long."""
        self._thread.join(seconds)

    @property
    def answers(self) -> bool:
        """Whether its gang takes requests."""
        gang = self.gang
        return gang is not None and gang.alive

    @property
    def has_gang(self) -> bool:
        """Whether there are ranks that have to end before the server does."""
        return self._thread.is_alive() and (self.gang is not None or self.state == STARTING)

    # What follows runs in the thread of the runner.

    def _run(self) -> None:
        desk, pause = self._desk, FIRST_PAUSE
        while desk.wait_until_needed(self):
            self.state = STARTING
            try:
                gang = self._start_gang(self.number, lambda: desk.draining)
            except XditError as error:
                if desk.draining:
                    desk.log.write("the ranks were ended while they loaded", gang=self.number)
                    break
                desk.log.write("the ranks could not be started", "error", gang=self.number, error=error, pause=pause)
            except Exception as error:
                desk.log.unexpected("the ranks could not be started", error, gang=self.number, pause=pause)
            else:
                desk.metrics.count("xdit_gang_starts_total")
                desk.log.write("the ranks are ready", gang=self.number, load_seconds=gang.load_seconds)
                retired = False
                try:
                    retired = self._serve(gang)
                    if self._answered:
                        pause = FIRST_PAUSE
                except Exception as error:  # such as a disk that cannot be read: jobs wait in memory
                    desk.log.unexpected("jobs could not be read", error, gang=self.number, pause=pause)
                if retired or self.stale:
                    why = "are started again" if self.stale else "were not needed any more"
                    desk.log.write(f"the ranks {why}", gang=self.number)
                    self.stale = False
                    continue
                if not desk.draining:
                    desk.metrics.count("xdit_gang_ends_total")
                    desk.log.write("the ranks have ended", "error", gang=self.number, error=gang.error, pause=pause)
            self.state = RESTING
            desk.pause(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _serve(self, gang: AnyGang) -> bool:
        """Answer jobs while the gang lives.

        Returns:
            Whether it ended because it was not needed any more.
        """
        desk, retired, since = self._desk, False, time.monotonic()
        self.gang, self._answered = gang, False
        followers: list[threading.Thread] = []
        try:
            while self._has_place(gang):
                followers = [thread for thread in followers if thread.is_alive()]
                self.state = BUSY if followers else IDLE
                current = desk.take(self)
                if current is not None:
                    name = f"xdit-job-{current.job.id}"
                    followers.append(threading.Thread(target=self._follow, args=(gang, current), name=name))
                    followers[-1].start()
                    since = time.monotonic()
                    continue
                self._places.release()
                if followers:
                    since = time.monotonic()
                elif self.spare and time.monotonic() - since > self._longest_idle:
                    retired = True
                    break
        finally:
            for thread in followers:
                thread.join()
            self.state = RESTING
            gang.close()
            self.gang = None
        return retired

    def _has_place(self, gang: AnyGang) -> bool:
        """Wait for a place for another job, which is then taken; False if the gang gets no more jobs."""
        while gang.alive and not self._desk.draining and not self.stale:
            if self._places.acquire(timeout=PLACE):
                if gang.alive:  # the job that left the place may have ended with the gang
                    return True
                self._places.release()
        return False

    # What follows runs in a thread for each job.

    def _follow(self, gang: AnyGang, current: Current) -> None:
        try:
            self._answered = self._answer(gang, current) or self._answered
        except Exception as error:  # such as a full disk: the job ends, and the server goes on
            self._desk.broken(current, error)
        finally:
            self._desk.release(current)

    def _answer(self, gang: AnyGang, current: Current) -> bool:
        """Draw a job.

        Returns:
            Whether the gang has answered it, in whatever way.
        """
        desk, job, begun = self._desk, current.job, time.time()
        settings = {**job.request["settings"], **({"trace": True} if job.request.get("trace") else {})}
        try:
            try:
                asked = gang.submit([job.request["prompt"]], previews=int(job.request.get("previews", 0)), **settings)
                current.has(asked)
                for event in asked.events():
                    if event.kind == "started":
                        begun = event.at
                        desk.begin(current)
                    desk.tell(current, event)
            finally:
                self._places.release()  # the gang gets the next job while the results of this one are stored
            results = asked.result()
        except RequestCancelled:
            reason = current.cancelled or "the ranks were ended."
            outcome = Outcome(FAILED if current.expired else CANCELLED, reason)
        except RequestFailed as error:
            outcome = Outcome(FAILED, str(error), error.refused)
        except UsageError as error:
            outcome = Outcome(FAILED, str(error), refused=True)
        except GangEnded as error:
            desk.lost(current, error)
            return False
        else:
            seconds = results[0].seconds
            files = tuple(files_of(results, job.request, job.about))
            desk.measured(current, {**seconds, "run": time.time() - begun})
            outcome = Outcome(DONE, seconds=seconds, files=files)
        desk.end(job.id, outcome)
        return True
