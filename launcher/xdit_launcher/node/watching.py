"""Watch the ranks of a run, wherever they are, until they are done or one is to blame."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import FrameType

import click

from xdit_core.printable import printable
from xdit_launcher.node.root_cause import RankStatus, RootCause, blame, decided

NOTICE = 10.0  # seconds after which it is said that a machine has not come
ASLEEP = 5.0  # seconds that no look takes unless the whole run was stopped
CAUSE = 2.0  # seconds in which the cause of a lost connection should show itself
INTERRUPTED = 130

Look = Callable[[], Mapping[int, RankStatus]]


STUCK = 600.0  # seconds without a beat of any rank
QUICK = 20.0  # the least of those seconds between two steps
SETTLED = 3  # the step from which on the pauses of a run are known


@dataclass
class Pace:
    """How long a run may stand still.

    Args:
        timeout: seconds given by the user, None: found from the run itself.
    """

    timeout: float | None
    longest: float = 0.0
    settled: bool = False

    def moved(self, pause: float, seen: Mapping[int, RankStatus]) -> None:
        """A rank moved after so many seconds."""
        steps = [s.status.step for s in seen.values()]
        self.longest = max(self.longest, pause) if all(steps) else 0.0
        self.settled = min(steps, default=0) >= SETTLED

    @property
    def limit(self) -> float:
        """Seconds; once every rank makes steps, ten times the longest pause so far."""
        if self.timeout is not None:
            return self.timeout
        return min(STUCK, max(QUICK, 10 * self.longest)) if self.settled else STUCK


def watch(
    look: Look,
    timeout: float | None,
    cause: float = CAUSE,
    ask_for_stacks: Callable[[], None] | None = None,
    elsewhere: bool = False,
    absent: Callable[[Mapping[int, RankStatus]], str] | None = None,
) -> RootCause | None:
    """Wait until all ranks are done, one has failed, or none moves any more.

    Args:
        look: what is known of each rank; returns after some milliseconds.
        timeout: seconds without a beat of any rank after which the run counts as stuck, None: see `Pace`.
        cause: seconds to wait for a cause when only ranks that lost their peers were seen.
        ask_for_stacks: makes the ranks write into their logs where they are.
        elsewhere: there are ranks that ``look`` cannot see.
        absent: a sentence about machines that have not come, "" if all have.

    Returns:
        Whom to blame, None if all went well.
    """
    counts: list[int] = []
    moved, pace = time.monotonic(), Pace(timeout)
    notice = moved + NOTICE
    while True:
        before = time.monotonic()
        seen = look()
        took = time.monotonic() - before
        moved += took if took > ASLEEP else 0.0
        if absent and time.monotonic() > notice:
            notice = math.inf
            if text := absent(seen):
                say(f"waiting: {text}")
        if any(s.failed for s in seen.values()):
            end = time.monotonic() + cause
            while time.monotonic() < end and not decided(seen):
                seen = look()
            return blame(seen, elsewhere=elsewhere)
        if all(s.code == 0 for s in seen.values()):
            return None
        fresh = [s.pulse.count if s.pulse else 0 for s in seen.values()]
        if fresh != counts:
            pace.moved(time.monotonic() - moved, seen)
            counts, moved = fresh, time.monotonic()
        elif time.monotonic() - moved > pace.limit:
            if ask_for_stacks:
                ask_for_stacks()
            if absent and (text := absent(seen)):
                rank, s = next(iter(seen.items()))
                return RootCause(rank, s.host, s.status, text, 1, s.log)
            return blame(seen, stuck_for=pace.limit, elsewhere=elsewhere)


def say(text: str) -> None:
    """On stderr, in place of a progress line that may stand there; a terminal that has gone must not stop the work."""
    with contextlib.suppress(OSError):
        click.echo(("\r\x1b[K" if sys.stderr.isatty() else "") + printable(text, keep="\n"), err=True)


ENDING = tuple(s for name in ("SIGTERM", "SIGHUP") if (s := getattr(signal, name, None)) is not None)


@contextlib.contextmanager
def signals_interrupt() -> Iterator[None]:
    """SIGTERM, and SIGHUP of a terminal that is closed, act as Ctrl-C; under ``nohup`` SIGHUP stays ignored."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in ENDING}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Suspension:
    """Ctrl-Z stops the processes of a run together with the launcher, and ``fg``, ``bg`` or SIGCONT lets all go on.

    The processes have sessions of their own, which a terminal does not stop.

    Args:
        pause, resume: stop the processes, and let them go on.
    """

    def __init__(self, pause: Callable[[], None], resume: Callable[[], None]) -> None:
        self.pause, self.resume, self._wanted = pause, resume, False

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Take the signal, where signals come and nobody ignores it."""
        if (
            threading.current_thread() is not threading.main_thread()
            or signal.getsignal(signal.SIGTSTP) != signal.SIG_DFL
        ):
            yield
            return

        def note(number: int, frame: FrameType | None) -> None:
            self._wanted = True  # no more: what is being done may hold a lock

        signal.signal(signal.SIGTSTP, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTSTP, signal.SIG_DFL)

    def settle(self) -> float:
        """Stop here if it is wanted.

        Returns:
            For how many seconds everything stood still.
        """
        if not self._wanted:
            return 0.0
        self._wanted = False
        began = time.monotonic()
        self.pause()
        try:
            os.kill(os.getpid(), signal.SIGSTOP)
        finally:
            self.resume()
        return time.monotonic() - began


def stay_deaf() -> None:
    """No more interruptions until the process ends: whoever presses Ctrl-C once more while it tears down would hide how
    it ended."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, *ENDING):
            signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """No Ctrl-C in between: tearing down takes seconds, and whoever presses twice would leave processes behind."""
    if threading.current_thread() is not threading.main_thread():  # where signals do not come
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, *ENDING)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
