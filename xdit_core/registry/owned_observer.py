"""The observer of a plugin, whose errors name the plugin. Without torch."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any

from xdit_core.errors import PluginFailed
from xdit_core.observe.observer import UNSEEN, Around, Awaited, Observer, Sending
from xdit_core.observe.status import Status
from xdit_core.registry.owners import OwnedContext, Owner

if TYPE_CHECKING:
    import torch

    from xdit_core.points.context import ForwardContext
    from xdit_core.points.request import Job, Output


class OwnedObserver(Observer):
    """Passes everything on to the observer of a plugin.

    Args:
        observer: what the plugin returned from ``xdit_observe``.
        owner: the plugin.
    """

    def __init__(self, observer: Observer, owner: Owner) -> None:
        self._observer, self._owner = observer, owner
        self.sees_every_wait = observer.sees_every_wait
        self._waits, self._sends = observer.overrides("waiting"), observer.overrides("sending")

    def overrides(self, method: str) -> bool:
        """Whether the observer of the plugin does something in a method."""
        return self._observer.overrides(method)

    def _call(self, method: str, *args: Any) -> Any:
        return self._owner.call(f"{method} of its observer", getattr(self._observer, method), *args)

    def _around(self, method: str, *args: Any) -> Around | None:
        around = self._call(method, *args)
        if around is None:
            return None
        what = f"{method} of its observer"
        if not callable(around):
            raise PluginFailed(
                f"{self._owner} returned {around!r:.60} from {what}, where a function that makes a context, or None, "
                "is expected."
            )
        return partial(OwnedContext, around, self._owner, what)

    def status(self, status: Status) -> None:
        """Pass it on."""
        self._call("status", status)

    def waiting(self, awaited: Awaited) -> AbstractContextManager[None]:
        """The plugin's context."""
        if not self._waits:
            return UNSEEN
        return OwnedContext(partial(self._observer.waiting, awaited), self._owner, "waiting of its observer")

    def sending(self, message: Sending) -> AbstractContextManager[None]:
        """The plugin's context."""
        if not self._sends:
            return UNSEEN
        return OwnedContext(partial(self._observer.sending, message), self._owner, "sending of its observer")

    def point(self, point: str, level: str, plugin: str) -> Around | None:
        """The plugin's contexts."""
        return self._around("point", point, level, plugin)

    def block(self, index: int) -> Around | None:
        """The plugin's contexts."""
        return self._around("block", index)

    def rows(self, place: int, rows: torch.Tensor, context: ForwardContext) -> None:
        """Pass them on."""
        self._call("rows", place, rows, context)

    def step_latents(self, step: int, latents: torch.Tensor) -> None:
        """Pass them on."""
        self._call("step_latents", step, latents)

    def latents(self, latents: torch.Tensor) -> None:
        """Pass them on."""
        self._call("latents", latents)

    def engine_built(self, seconds: float) -> None:
        """Pass it on."""
        self._call("engine_built", seconds)

    def engine_closed(self) -> None:
        """Pass it on."""
        self._call("engine_closed")

    def job_started(self, job: Job) -> None:
        """Pass it on."""
        self._call("job_started", job)

    def step_done(self, step: int, steps: int) -> None:
        """Pass it on."""
        self._call("step_done", step, steps)

    def job_done(self, job: Job, phases: Mapping[str, tuple[float, float]]) -> None:
        """Pass it on."""
        self._call("job_done", job, phases)

    def output_done(self, output: Output) -> None:
        """Pass it on."""
        self._call("output_done", output)
