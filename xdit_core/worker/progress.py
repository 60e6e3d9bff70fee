"""Show progress on rank 0: one line that is rewritten on a terminal, or a line now and then in a log."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from xdit_core.observe.observer import Observer
from xdit_core.observe.status import Phase, Status
from xdit_core.printable import cut, printable

SELDOM = 10.0  # seconds between lines in a log


def duration(seconds: float) -> str:
    """Format seconds as ``12 s``, ``3 min 20 s`` or ``2 h 5 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


class Progress(Observer):
    """The progress line.

    Args:
        screen: the stream that it is written to; None shows nothing.
        width: columns of the terminal, if another process passes the stream on to one; None: find out whether
            ``screen`` is a terminal.
    """

    def __init__(self, screen: TextIO | None, width: int | None = None) -> None:
        self.screen, self._width = screen, width
        self.tty = screen is not None and (width is not None or screen.isatty())
        self._title, self._first, self._shown, self._last = "", 0.0, 0.0, ""

    def show(self, text: str) -> None:
        """Show a text for a phase without steps; only on a terminal."""
        if self.tty:
            self._put(text)

    def status(self, status: Status) -> None:
        """Show which component is being loaded; other statuses are not shown."""
        if status.phase == Phase.LOADING and not status.waiting:
            self.show(str(status))

    def begin(self, title: str) -> None:
        """Begin the steps of a new prompt."""
        self._title, self._shown = title, time.monotonic()
        self.show(f"encoding {title!r}")

    def step_done(self, step: int, steps: int) -> None:
        """Show a finished step. The first one only starts the clock, since it is slower than the others."""
        if self.screen is None:
            return
        now = time.monotonic()
        if step == 1:
            self._first = now
        seconds = (now - self._first) / (step - 1) if step > 1 else 0.0
        pace = f"{seconds:.2f} s/step  " if step > 1 else ""
        left = f"about {duration(seconds * (steps - step))} left  " if 1 < step < steps else ""
        words = f"step {step}/{steps}  {left}{pace}peak {self.peak() / 2**30:.2f} GiB  {self._title}"
        if self.tty:
            full = 20 * step // steps
            self._put(f"[{'#' * full}{'.' * (20 - full)}] {words}")
        elif step == steps or now - self._shown > SELDOM:
            self._shown = now
            self._write(printable(words) + "\n")

    def end(self) -> None:
        """End the progress of a prompt."""
        self.clear()

    def clear(self) -> None:
        """Erase the line, so that something else can be written."""
        if self.tty and self._last:
            self._write("\r\x1b[K")
            self._last = ""

    def say(self, line: str) -> None:
        """Write a line that stays."""
        self.clear()
        self._write(printable(line) + "\n")

    def _put(self, line: str) -> None:
        if self.screen is None:
            return
        line = printable(line)
        with contextlib.suppress(OSError):
            line = cut(line, (self._width or os.get_terminal_size(self.screen.fileno()).columns or 80) - 1)
        self._last = line
        self._write("\r\x1b[K" + line)

    def _write(self, text: str) -> None:
        if self.screen is not None:
            with contextlib.suppress(OSError, ValueError):  # a closed terminal must not end the run
                self.screen.write(text)
                self.screen.flush()

    @staticmethod
    def peak() -> int:
        """Return the peak memory in bytes: of the GPU, or of this process."""
        torch: Any = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            return int(torch.cuda.max_memory_allocated())
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return used if sys.platform == "darwin" else used * 1024


class Tee:
    """Replaces ``sys.stdout`` so that prints go to the log and to the terminal.

    Args:
        log, terminal: the two streams.
        before: called before something is written to the terminal.
    """

    encoding = "utf-8"

    def __init__(self, log: TextIO, terminal: TextIO, before: Callable[[], None]) -> None:
        self._log, self._terminal, self._before = log, terminal, before

    def write(self, text: str) -> int:
        """Write to both streams."""
        self._log.write(text)
        with contextlib.suppress(OSError, ValueError):
            self._before()
            self._terminal.write(text)
            self._terminal.flush()
        return len(text)

    def flush(self) -> None:
        """Flush both streams."""
        self._log.flush()
        with contextlib.suppress(OSError, ValueError):
            self._terminal.flush()

    def isatty(self) -> bool:
        """Return whether the terminal is one."""
        return self._terminal.isatty()
