"""Which rank to blame for a failed run, and how to say so in a few lines."""

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


@dataclass(frozen=True)
class RankStatus:
    """What is known of a rank.

    Args:
        host: where it runs.
        code: its exit code, negative for signals; None while it runs.
        pulse: its last beat.
        error: what it told of its failure, see `xdit_core.worker.failure`.
        lost: why nothing is heard of its host any more.
        log: where its log is.
    """

    host: str
    code: int | None = None
    pulse: Heartbeat | None = None
    error: Mapping[str, Any] | None = None
    lost: str = ""
    log: str = ""

    @property
    def failed(self) -> bool:
        """It ended badly, or its host is gone before it was done."""
        return bool(self.code) or bool(self.lost and self.code is None)

    @property
    def status(self) -> Status:
        """What it was doing at its last beat."""
        return self.pulse.status if self.pulse else STARTING


@dataclass(frozen=True)
class RootCause:
    """The cause of a failure.

    Args:
        status: what the rank was doing.
        sentence: what went wrong.
        code: the exit code for the whole run.
        log: where the rank's log is.
    """

    rank: int
    host: str
    status: Status
    sentence: str
    code: int
    log: str = ""


def read_error(folder: Path, rank: int) -> Mapping[str, Any] | None:
    """The error file of a rank, None if there is none or its disk failed."""
    try:
        found: Mapping[str, Any] = json.loads(error_path(folder, rank).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found


def errors_in(seen: Mapping[int, RankStatus]) -> list[Mapping[str, Any]]:
    """What the ranks told, the earliest first."""
    found = [s.error for s in seen.values() if s.error]
    one_host = len({e["host"] for e in found}) == 1
    return sorted(found, key=lambda e: float(e["monotonic" if one_host else "wall"]))


def decided(seen: Mapping[int, RankStatus]) -> bool:
    """A cause is known, and not only ranks that lost their peers."""
    silent = any(s.failed and not s.error for s in seen.values())
    return silent or any(not e["victim"] for e in errors_in(seen))


ELSEWHERE = "no rank of this node is the cause; the launcher of another node says what happened there"


def blame(seen: Mapping[int, RankStatus], stuck_for: float | None = None, elsewhere: bool = False) -> RootCause:
    """The cause: the earliest error of a rank's own, else a lost host, a death by signal, an exit without a word, or
    who is behind.

    Args:
        seen: the ranks, before anything was ended by the launcher.
        stuck_for: seconds without progress, if that is why the run is ended.
        elsewhere: there are ranks that are not among those seen.
    """
    errors = errors_in(seen)
    own = next((e for e in errors if not e["victim"]), None)
    if own is not None:
        return told(own, seen[own["rank"]].log)

    def silent(rank: int, sentence: str, code: int) -> RootCause:
        return RootCause(rank, seen[rank].host, seen[rank].status, sentence, code, seen[rank].log)

    for rank, s in seen.items():
        if s.lost and s.code is None:
            others = [r for r, t in seen.items() if t.host == s.host and t.code is None]
            which = (
                f"ranks {others[0]} to {others[-1]} were lost with their host"
                if len(others) > 1
                else "it was lost with its host"
            )
            return silent(rank, f"{which}: {s.lost}", 1)
    for rank, s in seen.items():
        if s.code is not None and s.code < 0:
            return silent(rank, by_signal(-s.code), 128 - s.code)
    for rank, s in seen.items():
        if s.code and not s.error:
            return silent(rank, f"it ended with exit code {s.code} and left no error", s.code)
    running = [rank for rank, s in seen.items() if s.code != 0] or list(seen)

    def progress(rank: int) -> tuple[bool, int, int]:
        pulse = seen[rank].pulse
        return (pulse.status.waiting, pulse.count, rank) if pulse else (False, 0, rank)

    last = min(running, key=progress)
    if stuck_for is not None:
        hint = "its stack is in the log; give a larger timeout= if it only is slow"
        return silent(last, f"no rank made progress for {stuck_for:.0f} s and this one is behind; {hint}", 1)
    error = seen[last].error
    if error:
        found = told(error, seen[last].log)
        return replace(found, sentence=f"it lost its connection to other ranks; {ELSEWHERE}") if elsewhere else found
    return silent(last, "the other ranks lost their connection and this one is behind", 1)


def told(error: Mapping[str, Any], log: str = "") -> RootCause:
    """From what a rank wrote itself."""
    text = " ".join(str(error["message"]).split("\nException raised from")[0].split())
    sentence = text if error["known"] else f"{error['type']}: {text}"
    return RootCause(error["rank"], error["host"], Status.from_dict(error["status"]), sentence, error["exit_code"], log)


def progress(seen: Mapping[int, RankStatus], plan: Plan) -> list[str]:
    """How many of several results are where they should be, after a run that did not go to its end."""
    total = sum(map(len, targets(plan.run, plan.facts.video)))
    if total < 2:
        return []
    written = sum(s.pulse.written for s in seen.values() if s.pulse)
    folder = plan.run.out if is_folder(plan.run.out) else str(Path(plan.run.out).parent)
    hint = "; resume=yes draws the rest" if 0 < written < total else ""
    return [f"{written} of {total} {'is' if written == 1 else 'are'} in {folder.rstrip('/')}/{hint}"]


def by_signal(number: int) -> str:
    """A death by signal in words."""
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = "unknown"
    often = ", often the kernel's out-of-memory killer" if number == signal.SIGKILL else ""
    return f"it was killed by signal {number} ({name}){often}"


def lines(found: RootCause, world: int, together: bool = True) -> list[str]:
    """The report: who, doing what; why; where the logs are.

    Args:
        together: the logs of all ranks lie in one folder.
    """
    report = [
        f"rank {found.rank} of {world} on {found.host} failed at: {found.status}",
        f"  {found.sentence[:600]}",
        f"  log: {found.log}" + (" (the others' beside it)" if world > 1 and together else ""),
    ]
    return [printable(line) for line in report]
