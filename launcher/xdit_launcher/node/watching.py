"""Watch the ranks of a run, wherever they are, until all are done or one has failed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from xdit_core.settings import STUCK
from xdit_launcher.node.root_cause import RankStatuses, RootCause, cause_is_known, find_root_cause
from xdit_launcher.printing import say

ABSENCE_NOTICE = 10.0  # seconds after which the user is told that a machine is missing
ASLEEP = 5.0  # seconds; a look that takes longer means that the whole run was stopped for a while
CAUSE_PATIENCE = 2.0  # seconds in which the cause of a lost connection should show itself
SHORTEST_LIMIT = 20.0  # seconds; the least that a run may stand still between two steps
SETTLED = 3  # the step from which on the pauses of a run are known

Look = Callable[[], RankStatuses]


@dataclass
class StallLimit:
    """How long a run may stand still.

    Args:
        timeout: seconds that the user gave, None to learn them from the run itself.
        longest_pause: seconds between two heartbeats while all ranks make steps.
        settled: every rank has made enough steps to know that.
    """

    timeout: float | None
    longest_pause: float = 0.0
    settled: bool = False

    def note_progress(self, pause: float, statuses: RankStatuses) -> None:
        """Note that a rank moved after so many seconds."""
        steps = [s.status.step for s in statuses.values()]
        self.longest_pause = max(self.longest_pause, pause) if all(steps) else 0.0
        self.settled = min(steps, default=0) >= SETTLED

    @property
    def seconds(self) -> float:
        """The limit: once every rank makes steps, ten times the longest pause so far."""
        if self.timeout is not None:
            return self.timeout
        return min(STUCK, max(SHORTEST_LIMIT, 10 * self.longest_pause)) if self.settled else STUCK


class Watch:
    """Looks at the ranks again and again, and finds out when one has failed or none moves any more.

    Args:
        timeout: seconds without a heartbeat of any rank after which the run counts as stuck; None: see `StallLimit`.
        cause_patience: seconds to wait for the cause when so far only ranks have failed that lost their peers.
        ask_for_stacks: makes the ranks write the stacks of their threads into their logs.
        elsewhere: other machines run ranks that are not looked at.
        absent: makes a sentence about machines that have not joined, "" if all have.
    """

    def __init__(
        self,
        timeout: float | None,
        cause_patience: float = CAUSE_PATIENCE,
        ask_for_stacks: Callable[[], None] | None = None,
        elsewhere: bool = False,
        absent: Callable[[RankStatuses], str] | None = None,
    ) -> None:
        self._patience, self._ask_for_stacks = cause_patience, ask_for_stacks
        self._elsewhere, self._absent = elsewhere, absent
        self._counts: list[int] = []
        self._last_progress, self._limit = time.monotonic(), StallLimit(timeout)
        self._notice_at = self._last_progress + ABSENCE_NOTICE

    def look(self, look: Look, idle: bool = False) -> RootCause | None:
        """Look at the ranks.

        Args:
            look: returns what is known of each rank.
            idle: the ranks wait for a request, so that none has to move.

        Returns:
            The cause if the run has failed.
        """
        before = time.monotonic()
        statuses = look()
        duration = time.monotonic() - before
        self._last_progress += duration if duration > ASLEEP else 0.0
        if self._absent and time.monotonic() > self._notice_at:
            self._notice_at = math.inf
            if sentence := self._absent(statuses):
                say(f"waiting: {sentence}")
        if any(s.failed for s in statuses.values()):
            end = time.monotonic() + self._patience
            while time.monotonic() < end and not cause_is_known(statuses):
                statuses = look()
            return find_root_cause(statuses, elsewhere=self._elsewhere)
        if all(s.code == 0 for s in statuses.values()):
            return None
        counts = [s.heartbeat.count if s.heartbeat else 0 for s in statuses.values()]
        if counts != self._counts or idle:
            self._limit.note_progress(time.monotonic() - self._last_progress, statuses)
            self._counts, self._last_progress = counts, time.monotonic()
        elif time.monotonic() - self._last_progress > self._limit.seconds:
            if self._ask_for_stacks:
                self._ask_for_stacks()
            if self._absent and (sentence := self._absent(statuses)):
                rank, s = next(iter(statuses.items()))
                return RootCause(rank, s.host, s.status, sentence, 1, s.log)
            return find_root_cause(statuses, stuck_for=self._limit.seconds, elsewhere=self._elsewhere)
        return None


def watch(look: Look, watcher: Watch) -> RootCause | None:
    """Wait until all ranks are done, one has failed, or none moves any more.

    Args:
        look: returns what is known of each rank, after some milliseconds.

    Returns:
        The cause of the failure, None if all ranks ended well.
    """
    statuses: RankStatuses = {}

    def noted() -> RankStatuses:
        nonlocal statuses
        statuses = look()
        return statuses

    while True:
        if cause := watcher.look(noted):
            return cause
        if all(s.code == 0 for s in statuses.values()):
            return None
