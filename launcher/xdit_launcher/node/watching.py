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


def watch(
    look: Look,
    timeout: float | None,
    cause_patience: float = CAUSE_PATIENCE,
    ask_for_stacks: Callable[[], None] | None = None,
    elsewhere: bool = False,
    absent: Callable[[RankStatuses], str] | None = None,
) -> RootCause | None:
    """Wait until all ranks are done, one has failed, or none moves any more.

    Args:
        look: returns what is known of each rank, after some milliseconds.
        timeout: seconds without a heartbeat of any rank after which the run counts as stuck; None: see `StallLimit`.
        cause_patience: seconds to wait for the cause when so far only ranks have failed that lost their peers.
        ask_for_stacks: makes the ranks write the stacks of their threads into their logs.
        elsewhere: other machines run ranks that ``look`` does not know.
        absent: makes a sentence about machines that have not joined, "" if all have.

    Returns:
        The cause of the failure, None if all ranks ended well.
    """
    counts: list[int] = []
    last_progress, limit = time.monotonic(), StallLimit(timeout)
    notice_at = last_progress + ABSENCE_NOTICE
    while True:
        before = time.monotonic()
        statuses = look()
        duration = time.monotonic() - before
        last_progress += duration if duration > ASLEEP else 0.0
        if absent and time.monotonic() > notice_at:
            notice_at = math.inf
            if sentence := absent(statuses):
                say(f"waiting: {sentence}")
        if any(s.failed for s in statuses.values()):
            end = time.monotonic() + cause_patience
            while time.monotonic() < end and not cause_is_known(statuses):
                statuses = look()
            return find_root_cause(statuses, elsewhere=elsewhere)
        if all(s.code == 0 for s in statuses.values()):
            return None
        new_counts = [s.heartbeat.count if s.heartbeat else 0 for s in statuses.values()]
        if new_counts != counts:
            limit.note_progress(time.monotonic() - last_progress, statuses)
            counts, last_progress = new_counts, time.monotonic()
        elif time.monotonic() - last_progress > limit.seconds:
            if ask_for_stacks:
                ask_for_stacks()
            if absent and (sentence := absent(statuses)):
                rank, s = next(iter(statuses.items()))
                return RootCause(rank, s.host, s.status, sentence, 1, s.log)
            return find_root_cause(statuses, stuck_for=limit.seconds, elsewhere=elsewhere)
