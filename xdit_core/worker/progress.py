"""What rank 0 shows: one progress line that is rewritten, or a line now and then where nobody watches."""

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
    """``12 s``, ``3 min 20 s`` or ``2 h 5 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


class Progress(Observer):
    """The progress line.

    Args:
        screen: where it goes; None shows nothing.
        width: columns of the terminal to which somebody else passes on what is written; None: see whether ``screen`` is
            one.
    """

    def __init__(self, screen: TextIO | None, width: int | None = None) -> None:
        self.screen, self._width = screen, width
        self.tty = screen is not None and (width is not None or screen.isatty())
        self._title, self._first, self._shown, self._last = "", 0.0, 0.0, ""

    def show(self, text: str) -> None:
        """Words for a phase without steps; only where somebody watches."""
        if self.tty:
            self._put(text)

    def status(self, status: Status) -> None:
        """Show what is being loaded, of all that the rank does."""
        if status.phase == Phase.LOADING and not status.waiting:
            self.show(str(status))

    def begin(self, title: str) -> None:
        """The steps of a new prompt follow."""
        self._title, self._shown = title, time.monotonic()
        self.show(f"encoding {title!r}")

    def step_done(self, step: int, steps: int) -> None:
        """A step is done; the first one only starts the clock, since it is slower than the others."""
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
        """The prompt is done."""
        self.clear()

    def clear(self) -> None:
        """Take the line away, so that something else can be written."""
        if self.tty and self._last:
            self._write("\r\x1b[K")
            self._last = ""

    def say(self, line: str) -> None:
        """A line that stays."""
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
        """Most memory so far in bytes: of the GPU, or of this process."""
        torch: Any = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            return int(torch.cuda.max_memory_allocated())
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return used if sys.platform == "darwin" else used * 1024


class Tee:
    """Stands for ``sys.stdout``: what is printed goes to the log and to the terminal.

    Args:
        log, terminal: where to.
        before: called before the terminal is written to.
    """

    encoding = "utf-8"

    def __init__(self, log: TextIO, terminal: TextIO, before: Callable[[], None]) -> None:
        self._log, self._terminal, self._before = log, terminal, before

    def write(self, text: str) -> int:
        """Write to both."""
        self._log.write(text)
        with contextlib.suppress(OSError, ValueError):
            self._before()
            self._terminal.write(text)
            self._terminal.flush()
        return len(text)

    def flush(self) -> None:
        """Flush both."""
        self._log.flush()
        with contextlib.suppress(OSError, ValueError):
            self._terminal.flush()

    def isatty(self) -> bool:
        """Whether somebody watches."""
        return self._terminal.isatty()
