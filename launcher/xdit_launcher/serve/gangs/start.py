"""Choose where the gangs of a server come from. Without torch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from xdit_launcher.serve.gangs.beside import GangsBeside
from xdit_launcher.serve.gangs.replicas import Gangs, Replicas

if TYPE_CHECKING:
    from xdit_core.plan import Plan
    from xdit_launcher.backends.base import Backend
    from xdit_launcher.gang.loras import AllowedLoras
    from xdit_launcher.serve.limits import ServeSettings


@contextlib.contextmanager
def gangs(
    plan: Plan, on: Backend, replicas: Replicas, limits: ServeSettings, name: str, loras: AllowedLoras
) -> Iterator[Gangs]:
    """The gangs of a server; they end with the context.

    Args:
        loras: that requests may ask for.
        name: of the server, the same when it is started again.

    Raises:
        UsageError: there is no room for so many.
    """
    if on.name == "ray" and replicas.most > 1:
        from xdit_launcher.serve.gangs.ray_serve import serving

        on.check(plan)
        with serving(plan, on.settings, replicas, limits, name, loras) as deployed:
            yield deployed
    else:
        yield GangsBeside(plan, on, replicas, limits.batch, loras)
