"""Gangs that the server itself starts, beside each other over one backend. Without torch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from xdit_launcher.gang.gang import Gang
from xdit_launcher.gang.job import RequestFailed
from xdit_launcher.serve.events import AnyGang
from xdit_launcher.serve.gangs.replicas import Replicas

if TYPE_CHECKING:
    from xdit_core.plan import Plan
    from xdit_launcher.backends.base import Backend
    from xdit_launcher.gang.loras import AllowedLoras

WARM_UP_STEPS = 2


class GangsBeside:
    """Gangs that this process starts, each over a backend of its own.

    Args:
        plan: of each gang.
        on: the backend.
        replicas: how many there are.
        batch: the most pictures that each draws together.
        loras: that requests may ask for.

    Raises:
        UsageError: there is no room for so many.
    """

    def __init__(
        self, plan: Plan, on: Backend, replicas: Replicas, batch: int = 1, loras: AllowedLoras | None = None
    ) -> None:
        self.replicas, self._plan, self._batch, self._loras = replicas, plan, batch, loras
        self._backends = [on.beside(plan, number, replicas.most) for number in range(replicas.most)]
        for backend in self._backends:
            backend.check(plan)

    def start(self, number: int, unwanted: Callable[[], bool]) -> AnyGang:
        """See `Gangs.start`."""
        return started(self._plan, self._backends[number], self._batch, self._loras, unwanted)

    def running(self) -> int | None:
        """See `Gangs.running`."""
        return None

    def renew(self) -> bool:
        """See `Gangs.renew`."""
        return False


def started(
    plan: Plan,
    on: Backend,
    batch: int,
    loras: AllowedLoras | None = None,
    unwanted: Callable[[], bool] = lambda: False,
) -> Gang:
    """Start a gang and let it draw once, so that it is known to answer, and has learnt to make previews.

    Raises:
        XditError: it could not be started, or ended with its first picture.
    """
    gang = Gang(plan=plan, backend=on, batch=batch, loras=loras, unwanted=unwanted)
    try:
        if plan.run.prompt:
            with contextlib.suppress(RequestFailed):  # a model may refuse so few steps; clients are told if it is more
                gang.generate(plan.run.prompt[0], progress=False, steps=WARM_UP_STEPS, images=1, seed=0)
    except BaseException:
        gang.close()
        raise
    return gang
