"""Find the rank that is the cause of a failed run, and report it in a few lines."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xdit_core.observe.status import STARTING, Status
from xdit_core.outputs.names import is_folder, targets
from xdit_core.printable import printable
from xdit_core.worker.failure import error_path
from xdit_core.worker.heartbeat import Heartbeat

if TYPE_CHECKING:
    from xdit_core.plan import Plan

ON_ANOTHER_NODE = "no rank of this node is the cause; the launcher of another node says what happened there"


@dataclass(frozen=True)
class RankStatus:
    """What is known of a rank.

    Args:
        host: name of the machine where it runs.
        code: its exit code, negative for signals; None while it runs.
        heartbeat: its last heartbeat, None if there was none yet.
        error: what it wrote about its failure, see `xdit_core.worker.failure`; None if it wrote nothing.
        lost: why its host cannot be heard any more, "" while it can.
        log: path of its log.
    """

    host: str
    code: int | None = None
    heartbeat: Heartbeat | None = None
    error: Mapping[str, Any] | None = None
    lost: str = ""
    log: str = ""

    @property
    def failed(self) -> bool:
        """Whether it ended with an error, or its host was lost before it ended."""
        return bool(self.code) or self.host_lost

    @property
    def host_lost(self) -> bool:
        """Whether its host was lost before it ended."""
        return bool(self.lost) and self.code is None

    @property
    def status(self) -> Status:
        """What it was doing at its last heartbeat."""
        return self.heartbeat.status if self.heartbeat else STARTING


RankStatuses = Mapping[int, RankStatus]  # by rank


@dataclass(frozen=True)
class RootCause:
    """The cause of a failed run.

    Args:
        rank: the rank that failed first.
        host: name of its machine.
        status: what it was doing.
        sentence: what went wrong.
        code: the exit code for the whole run.
        log: path of its log.
    """

    rank: int
    host: str
    status: Status
    sentence: str
    code: int
    log: str = ""


def read_error(folder: Path, rank: int) -> Mapping[str, Any] | None:
    """The error file of a rank, None if there is none or it cannot be read."""
    try:
        error: Mapping[str, Any] = json.loads(error_path(folder, rank).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return error


def errors_by_time(statuses: RankStatuses) -> list[Mapping[str, Any]]:
    """What the ranks wrote about their failures, the earliest first."""
    errors = [s.error for s in statuses.values() if s.error]
    one_host = len({error["host"] for error in errors}) == 1
    return sorted(errors, key=lambda error: float(error["monotonic" if one_host else "wall"]))


def cause_is_known(statuses: RankStatuses) -> bool:
    """Whether a rank failed by itself, and not only because it lost its peers."""
    silent = any(s.failed and not s.error for s in statuses.values())
    return silent or any(not error["victim"] for error in errors_by_time(statuses))


def find_root_cause(statuses: RankStatuses, stuck_for: float | None = None, elsewhere: bool = False) -> RootCause:
    """Find the cause of a failed run.

    It is the first of these that there is: the earliest error that is not the loss of a peer, a lost host, a rank that
    a signal ended, a rank that left no error, the rank that is furthest behind.

    Args:
        statuses: of the ranks, before the launcher ended any of them.
        stuck_for: seconds without progress, if that is why the run is ended.
        elsewhere: other machines run ranks that are not in ``statuses``.
    """
    own_error = next((error for error in errors_by_time(statuses) if not error["victim"]), None)
    if own_error is not None:
        return cause_from_error(own_error, statuses[own_error["rank"]].log)

    def cause(rank: int, sentence: str, code: int) -> RootCause:
        return RootCause(rank, statuses[rank].host, statuses[rank].status, sentence, code, statuses[rank].log)

    for rank, s in statuses.items():
        if s.host_lost:
            lost = [r for r, other in statuses.items() if other.host == s.host and other.code is None]
            several = f"ranks {lost[0]} to {lost[-1]} were lost with their host"
            return cause(rank, f"{several if len(lost) > 1 else 'it was lost with its host'}: {s.lost}", 1)
    for rank, s in statuses.items():
        if s.code is not None and s.code < 0 and not s.error:  # NCCL aborts ranks that lost a peer
            return cause(rank, describe_signal(-s.code), 128 - s.code)
    for rank, s in statuses.items():
        if s.code and not s.error:
            return cause(rank, f"it ended with exit code {s.code} and left no error", s.code)
    last = furthest_behind(statuses)
    if stuck_for is not None:
        hint = "its stack is in the log; give a larger timeout= if it is only slow"
        return cause(last, f"no rank made progress for {stuck_for:.0f} s and this one is behind; {hint}", 1)
    if error := statuses[last].error:
        victim = cause_from_error(error, statuses[last].log)
        if elsewhere:
            return replace(victim, sentence=f"it lost its connection to other ranks; {ON_ANOTHER_NODE}")
        return victim
    return cause(last, "the other ranks lost their connection and this one is behind", 1)


def furthest_behind(statuses: RankStatuses) -> int:
    """The rank that works and does not wait, or else the one with the fewest heartbeats."""
    running = [rank for rank, s in statuses.items() if s.code != 0] or list(statuses)

    def progress(rank: int) -> tuple[bool, int, int]:
        beat = statuses[rank].heartbeat
        return (beat.status.waiting, beat.count, rank) if beat else (False, 0, rank)

    return min(running, key=progress)


def cause_from_error(error: Mapping[str, Any], log: str = "") -> RootCause:
    """The cause as the rank itself wrote it."""
    text = " ".join(str(error["message"]).split("\nException raised from")[0].split())
    sentence = text if error["known"] else f"{error['type']}: {text}"
    return RootCause(error["rank"], error["host"], Status.from_dict(error["status"]), sentence, error["exit_code"], log)


def describe_signal(number: int) -> str:
    """A sentence about a process that a signal ended."""
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = "unknown"
    often = ", often the kernel's out-of-memory killer" if number == signal.SIGKILL else ""
    return f"it was killed by signal {number} ({name}){often}"


def report_lines(cause: RootCause, world: int, together: bool = True) -> list[str]:
    """The report of a failure: which rank, what it was doing, what went wrong, where the logs are.

    Args:
        world: number of ranks.
        together: the logs of all ranks lie in one folder.
    """
    report = [
        f"rank {cause.rank} of {world} on {cause.host} failed at: {cause.status}",
        f"  {cause.sentence[:600]}",
        f"  log: {cause.log}" + (" (the others' beside it)" if world > 1 and together else ""),
    ]
    return [printable(line) for line in report]


def results_lines(statuses: RankStatuses, plan: Plan) -> list[str]:
    """A line that says how many of several results are written, after a run that did not finish."""
    total = sum(map(len, targets(plan.run, plan.facts.video)))
    if total < 2:
        return []
    written = sum(s.heartbeat.written for s in statuses.values() if s.heartbeat)
    folder = plan.run.out if is_folder(plan.run.out) else str(Path(plan.run.out).parent)
    hint = "; resume=yes draws the rest" if 0 < written < total else ""
    return [f"{written} of {total} {'is' if written == 1 else 'are'} in {folder.rstrip('/')}/{hint}"]
