"""A plugin as somebody else would write it, which only observes: it counts what happens on a rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from xdit_core import Observer, hookimpl


@dataclass(frozen=True)
class Settings:
    """Which steps and blocks are counted."""

    every: int = 1


class Counting(Observer):
    """Counts steps, blocks, calls of wraps, waits, messages and results."""

    def __init__(self, every: int) -> None:
        self.every, self.counts, self.times = every, Counter[str](), [0.0]

    @contextmanager
    def count(self, name: str) -> Iterator[None]:
        self.counts[f"{name} begun"] += 1
        yield
        self.counts[name] += 1

    def waiting(self, awaited: Any) -> Any:
        return self.count(f"waits for {awaited.axis}")

    def sending(self, message: Any) -> Any:
        return self.count(f"messages to {message.peer}")

    def point(self, point: str, level: str, plugin: str) -> Any:
        return partial(self.count, f"{point} {plugin}") if point in ("forward", "trunk") else None

    def block(self, index: int) -> Any:
        return None if index % self.every else partial(self.count, f"block {index}")

    def rows(self, place: int, rows: Any, context: Any) -> None:
        assert rows.shape[1] == sum(b - a for a, b in context.layout.picture(context.patch, context.shard))
        self.counts[f"rows {place}"] += rows.shape[1]

    def status(self, status: Any) -> None:
        self.counts[f"phase {status.phase}"] += 1

    def step_done(self, step: int, steps: int) -> None:
        self.counts["steps"] += 1

    def job_started(self, job: Any) -> None:
        self.counts["jobs begun"] += 1

    def job_done(self, job: Any, phases: Any) -> None:
        self.counts["jobs"] += 1
        self.times += [moment for times in phases.values() for moment in times]

    def latents(self, latents: Any) -> None:
        self.counts["latents"] += len(latents)

    def output_done(self, output: Any) -> None:
        self.counts["outputs"] += 1

    def engine_built(self, seconds: float) -> None:
        self.counts["built"] += 1

    def engine_closed(self) -> None:
        self.counts["closed"] += 1


@hookimpl
def xdit_settings() -> type[Any]:
    return Settings


@hookimpl
def xdit_observe(settings: Any, rank: Any) -> Observer:
    return Counting(settings.every)
