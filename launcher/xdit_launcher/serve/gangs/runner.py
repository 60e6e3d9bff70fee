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
from xdit_launcher.serve.records import CANCELLED, DONE, FAILED, NewFile

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0  # seconds before another gang is started
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

    def end(
        self,
        id: str,
        status: str,
        error: str | None = None,
        *,
        refused: bool = False,
        seconds: Mapping[str, float] | None = None,
        files: tuple[NewFile, ...] = (),
    ) -> None:
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
        start_gang: starts the gang of a number; raises XditError if it cannot.
        spare: its gang runs only while it is needed.
        idle: seconds without a job after which a spare gang ends.

    Attributes:
        stale: another gang is to be started once the present one has drawn its job.
    """

    def __init__(
        self, number: int, desk: Desk, start_gang: Callable[[int], AnyGang], spare: bool = False, idle: float = 0.0
    ) -> None:
        self.number, self.spare = number, spare
        self.gang: AnyGang | None = None
        self.state, self.stale = RESTING, False
        self._desk, self._start_gang, self._longest_idle = desk, start_gang, idle
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
        return self._thread.is_alive() and self.gang is not None

    # What follows runs in the thread of the runner.

    def _run(self) -> None:
        desk, pause = self._desk, FIRST_PAUSE
        while desk.wait_until_needed(self):
            self.state = STARTING
            try:
                gang = self._start_gang(self.number)
            except XditError as error:
                desk.log.write("the ranks could not be started", "error", gang=self.number, error=error, pause=pause)
            except Exception as error:
                desk.log.unexpected("the ranks could not be started", error, gang=self.number, pause=pause)
            else:
                desk.metrics.count("xdit_gang_starts_total")
                desk.log.write("the ranks are ready", gang=self.number, load_seconds=gang.load_seconds)
                retired = False
                try:
                    answered, retired = self._serve(gang)
                    if answered:
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

    def _serve(self, gang: AnyGang) -> tuple[bool, bool]:
        """Answer jobs while the gang lives.

        Returns:
            Whether it has answered one, and whether it ended because it was not needed any more.
        """
        desk, answered, retired = self._desk, False, False
        self.gang, since = gang, time.monotonic()
        try:
            while gang.alive and not desk.draining and not self.stale:
                self.state = IDLE
                current = desk.take(self)
                if current is None:
                    if self.spare and time.monotonic() - since > self._longest_idle:
                        retired = True
                        break
                    continue
                try:
                    answered = self._answer(gang, current) or answered
                except Exception as error:  # such as a full disk: the job ends, and the server goes on
                    desk.broken(current, error)
                finally:
                    desk.release(current)
                    since = time.monotonic()
        finally:
            self.state = RESTING
            gang.close()
            self.gang = None
        return answered, retired

    def _answer(self, gang: AnyGang, current: Current) -> bool:
        """Draw a job.

        Returns:
            Whether the gang has answered it, in whatever way.
        """
        desk, job, begun = self._desk, current.job, time.time()
        desk.begin(current)
        if job.started is None:
            desk.metrics.observe("xdit_job_seconds", begun - job.created, phase="wait")
        settings = dict(job.request["settings"])
        try:
            asked = gang.submit([job.request["prompt"]], previews=int(job.request.get("previews", 0)), **settings)
            current.has(asked)
            for event in asked.events():
                desk.tell(current, event)
            results = asked.result()
        except RequestCancelled:
            reason = current.cancelled or "the ranks were ended."
            desk.end(job.id, FAILED if current.expired else CANCELLED, reason)
        except RequestFailed as error:
            desk.end(job.id, FAILED, str(error), refused=error.refused)
        except UsageError as error:
            desk.end(job.id, FAILED, str(error), refused=True)
        except GangEnded as error:
            desk.lost(current, error)
            return False
        else:
            seconds = results[0].seconds
            files = tuple(files_of(results, job.request, job.about))
            desk.measured(current, {**seconds, "run": time.time() - begun})
            desk.end(job.id, DONE, seconds=seconds, files=files)
        return True
