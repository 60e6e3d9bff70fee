"""What a rank did and when: spans around the extension points in use, blocks, sends and waits.

The trace is an observer, whose contexts are put around wraps and blocks when the engine is built; without it none of
this is called and nothing is tested for in the hot path. Times are those of the host: on a GPU a span ends when its
work is queued, and waits for other GPUs show where the host must wait for the device.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from xdit_core.observe.observer import UNSEEN, Around, Awaited, Observer, Sending
from xdit_core.observe.spans import Span

if TYPE_CHECKING:
    from xdit_core.points.request import Job

clock = time.perf_counter_ns


class Trace(Observer):
    """The spans of one rank, in the order in which they ended.

    Attributes:
        recording: whether spans are kept at this moment.
    """

    sees_every_wait = True

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.recording = True
        self._groups: dict[Any, list[int]] = {}
        self._steps: list[tuple[int, int]] = []  # of this job: number, and when it was done

    def span(self, name: str, kind: str, axis: str = "", **about: Any) -> AbstractContextManager[None]:
        """Record how long the code inside takes."""
        return self._recorded(name, kind, axis, about) if self.recording else UNSEEN

    @contextlib.contextmanager
    def _recorded(self, name: str, kind: str, axis: str, about: dict[str, Any]) -> Iterator[None]:
        start = clock()
        try:
            yield
        finally:
            self.spans.append(Span(name, kind, start, clock(), axis, about))

    def point(self, point: str, level: str, plugin: str) -> Around:
        """Record each call of a wrap, and of the model's own code inside all wraps."""
        return partial(self.span, f"{point}: {plugin} ({level})" if plugin else f"{point}: the model's own", point)

    def block(self, index: int) -> Around:
        """Record each call of a block."""
        return partial(self.span, f"block {index}", "block")

    def waiting(self, awaited: Awaited) -> AbstractContextManager[None]:
        """Record each wait, and which message or collective it was for."""
        about: dict[str, Any] = {}
        if awaited.message is not None:
            about = dict(zip(("channel", "peer", "number"), awaited.message, strict=True))
        elif awaited.group is not None:
            about = {"ranks": self._ranks(awaited.group), **({"began": awaited.began} if awaited.began else {})}
        return self.span(awaited.what, "wait", awaited.axis, **about)

    def sending(self, message: Sending) -> AbstractContextManager[None]:
        """Record each message that is sent."""
        return self.span(
            f"send {message.channel}{message.what}",
            "send",
            message.axis,
            channel=message.channel,
            peer=message.peer,
            number=message.number,
            bytes=message.size,
        )

    def _ranks(self, group: Any) -> list[int]:
        if group not in self._groups:
            self._groups[group] = dist.get_process_group_ranks(group)
        return self._groups[group]

    def step_done(self, step: int, steps: int) -> None:
        """Remember when the step ended."""
        if self.recording:
            self._steps.append((step, clock()))

    def job_done(self, job: Job, phases: Mapping[str, tuple[float, float]]) -> None:
        """Record how long encoding, denoising and decoding took, and each step."""
        if not self.recording:
            return
        self.spans += [Span(name, "phase", int(a * 1e9), int(b * 1e9)) for name, (a, b) in phases.items() if b > a]
        starts = [int(phases["denoise"][0] * 1e9), *(moment for _, moment in self._steps)]
        self.spans += [
            Span(f"step {n}", "step", start, moment) for (n, moment), start in zip(self._steps, starts, strict=False)
        ]
        self._steps.clear()
