"""Signals while processes of a run exist: Ctrl-C, SIGTERM and SIGHUP end the run, Ctrl-Z stops it for a while."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

INTERRUPTED = 130  # exit code after Ctrl-C
ENDING = tuple(s for name in ("SIGTERM", "SIGHUP") if (s := getattr(signal, name, None)) is not None)


@contextlib.contextmanager
def signals_interrupt() -> Iterator[None]:
    """Let SIGTERM, and SIGHUP of a terminal that is closed, act as Ctrl-C; under ``nohup`` SIGHUP stays ignored."""

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
    """Stop a run together with the launcher on Ctrl-Z, and let it go on after ``fg``, ``bg`` or SIGCONT.

    The processes have sessions of their own, which a terminal does not stop.

    Args:
        pause, resume: stop the processes, and let them go on.
    """

    def __init__(self, pause: Callable[[], None], resume: Callable[[], None]) -> None:
        self.pause, self.resume, self._wanted = pause, resume, False

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Handle Ctrl-Z inside the block, unless this is not the main thread or the signal is ignored."""
        if (
            threading.current_thread() is not threading.main_thread()
            or signal.getsignal(signal.SIGTSTP) != signal.SIG_DFL
        ):
            yield
            return

        def note(number: int, frame: FrameType | None) -> None:
            self._wanted = True  # and no more: the interrupted code may hold a lock

        signal.signal(signal.SIGTSTP, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTSTP, signal.SIG_DFL)

    def settle(self) -> float:
        """Stop here if Ctrl-Z was pressed.

        Returns:
            For how many seconds everything was stopped.
        """
        if not self._wanted:
            return 0.0
        self._wanted = False
        start = time.monotonic()
        self.pause()
        try:
            os.kill(os.getpid(), signal.SIGSTOP)
        finally:
            self.resume()
        return time.monotonic() - start


def ignore_interrupts() -> None:
    """Ignore interruptions until this process ends, since another Ctrl-C would hide how the run ended."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, *ENDING):
            signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def without_interrupts() -> Iterator[None]:
    """Ignore interruptions inside the block, since another Ctrl-C would leave processes behind."""
    if threading.current_thread() is not threading.main_thread():  # where signals do not come
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, *ENDING)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
