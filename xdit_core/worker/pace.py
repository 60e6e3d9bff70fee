"""Keep the host of a rank near its device, so that its heartbeats tell how far the device has come.

A program that uses a GPU only queues work, and may be many steps ahead of a GPU that stands still. Without torch until
a mark is made.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from xdit_core.observe.observer import Awaited, Observer

if TYPE_CHECKING:
    from xdit_core.plan import Plan
    from xdit_core.points.request import Job

AHEAD = 2  # steps that the host may be ahead of the device: enough to keep the device busy


class Mark(Protocol):
    """A place in the work of a device, such as ``torch.cuda.Event``."""

    def query(self) -> bool:
        """Whether the device has come to it."""

    def synchronize(self) -> Any:
        """Wait until it has."""


class Pace(Observer):
    """Waits behind each step until the device has done the step that is ``AHEAD`` steps back.

    Args:
        mark: makes a mark behind the work that was queued so far.
        beat: told while this rank waits for its device.
    """

    def __init__(self, mark: Callable[[], Mark], beat: Observer) -> None:
        self._mark, self._beat = mark, beat
        self._marks: deque[tuple[int, Mark]] = deque()

    def job_started(self, job: Job) -> None:
        """Forget the marks of another call of the pipeline."""
        self._marks.clear()

    def step_done(self, step: int, steps: int) -> None:
        """Mark the end of a step, and wait for that of an earlier one."""
        self._marks.append((step, self._mark()))
        if len(self._marks) <= AHEAD:
            return
        earlier, mark = self._marks.popleft()
        if not mark.query():
            with self._beat.waiting(Awaited(f"its device to finish step {earlier}", "device")):
                mark.synchronize()


def pace_of(plan: Plan, beat: Observer) -> Pace | None:
    """The observer for the device of a plan; None on a CPU, which does its work when it is asked."""
    if plan.device != "cuda":
        return None

    def mark() -> Mark:
        import torch

        event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        made: Mark = event
        return made

    return Pace(mark, beat)
