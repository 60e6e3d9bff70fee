"""What an operator sees of a server: logs as lines of JSON, and metrics in the text format of Prometheus. Without
torch."""

from __future__ import annotations

import json
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from xdit_core.printable import printable

BUCKETS = (0.01, 0.05, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)  # seconds
LONGEST = 2000  # characters of a text in a line
Labels = tuple[tuple[str, str], ...]


class Log:
    """Lines of JSON, one for each thing that happened. Words of clients are data in them: no control characters.

    Args:
        stream: where they go, by default standard error.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream, self._lock = stream, threading.Lock()

    def write(self, event: str, level: str = "info", **more: Any) -> None:
        """Write a line.

        Args:
            event: what happened, in a few words.
            level: ``info``, ``warning`` or ``error``.
            more: data; None is left out.
        """
        line = {"time": round(time.time(), 3), "level": level, "event": event}
        line |= {name: plain(value) for name, value in more.items() if value is not None}
        with self._lock:
            stream = self._stream or sys.stderr
            stream.write(json.dumps(line) + "\n")
            stream.flush()

    def unexpected(self, event: str, error: BaseException, **more: Any) -> None:
        """Write a line about a mistake in the server, with its traceback."""
        text = "".join(traceback.format_exception(error))
        self.write(event, "error", **more, error=f"{type(error).__name__}: {error}", traceback=text)


def plain(value: Any) -> Any:
    """A value for a line of the log: texts are shortened, and their control characters written as escapes."""
    if isinstance(value, bool | int | float):
        return value
    text = printable(str(value), keep="\n")
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


class Metrics:
    """Counters, gauges and histograms. Every method may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._help: dict[str, tuple[str, str]] = {}
        self._values: dict[str, dict[Labels, float]] = {}
        self._times: dict[str, dict[Labels, list[float]]] = {}
        self._gauges: dict[str, Callable[[], Mapping[Labels, float] | float]] = {}

    def counter(self, name: str, text: str) -> None:
        """Announce a number that only grows."""
        self._help[name], self._values[name] = ("counter", text), {}

    def histogram(self, name: str, text: str) -> None:
        """Announce a time in seconds of which the distribution is wanted."""
        self._help[name], self._times[name] = ("histogram", text), {}

    def gauge(self, name: str, text: str, read: Callable[[], Mapping[Labels, float] | float]) -> None:
        """Announce a number that is read when somebody looks."""
        self._help[name], self._gauges[name] = ("gauge", text), read

    def count(self, name: str, value: float = 1.0, **labels: str) -> None:
        """Add to a counter."""
        with self._lock:
            values, key = self._values[name], tuple(sorted(labels.items()))
            values[key] = values.get(key, 0.0) + value

    def observe(self, name: str, seconds: float, **labels: str) -> None:
        """Add a time to a histogram."""
        with self._lock:
            row = self._times[name].setdefault(tuple(sorted(labels.items())), [0.0] * (len(BUCKETS) + 2))
            for i, bound in enumerate(BUCKETS):
                row[i] += seconds <= bound
            row[-2] += 1
            row[-1] += seconds

    def text(self) -> str:
        """All of them, as Prometheus reads them."""
        gauges = {name: read() for name, read in self._gauges.items()}
        lines = []
        with self._lock:
            for name, (kind, text) in self._help.items():
                lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
                if kind == "histogram":
                    for labels, row in self._times[name].items():
                        for bound, value in zip((*map(str, BUCKETS), "+Inf"), row, strict=False):
                            lines.append(sample(f"{name}_bucket", (*labels, ("le", bound)), value))
                        lines += [sample(f"{name}_count", labels, row[-2]), sample(f"{name}_sum", labels, row[-1])]
                    continue
                read_value = gauges.get(name, self._values.get(name, {}))
                values = read_value if isinstance(read_value, Mapping) else {(): read_value}
                lines += [sample(name, labels, value) for labels, value in values.items()]
        return "\n".join(lines) + "\n"


def announce(metrics: Metrics) -> None:
    """The counters of jobs and ranks."""
    metrics.counter("xdit_jobs_total", "jobs by outcome: accepted, queue_full, done, failed, cancelled")
    metrics.counter("xdit_jobs_begun_total", "jobs that were begun, by how many were drawn at once")
    metrics.counter("xdit_steps_total", "denoising steps that were done")
    metrics.counter("xdit_gang_starts_total", "how often ranks were started")
    metrics.counter("xdit_gang_ends_total", "how often ranks ended by themselves")
    metrics.histogram("xdit_job_seconds", "time of jobs by phase: wait, run, encode, denoise, decode")


def sample(name: str, labels: Labels, value: float) -> str:
    """One line of the text format."""
    inner = ",".join(f'{key}="{escaped(text)}"' for key, text in labels)
    return f"{name}{{{inner}}} {value:g}" if inner else f"{name} {value:g}"


def escaped(text: str) -> str:
    """A value of a label."""
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
