"""``Rank``, the object through which a strategy sees the rank that it runs on.

It holds the plan, the process groups of the mesh, the device and the counters; ``Rank.agree`` lets ranks decide
together, and ``Rank.waiting`` marks a wait for other ranks.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from xdit_core.errors import LockstepError, PluginError, XditError
from xdit_core.model_spec import ModelSpec
from xdit_core.observe.observer import Awaited, Observer
from xdit_core.parallel.mesh import Mesh
from xdit_core.points.context import ForwardContext, Running

if TYPE_CHECKING:
    from xdit_core.plan import Plan


Decision = TypeVar("Decision", bool, int, float)


def first(values: Sequence[Decision]) -> Decision:
    """Choose the value of the first rank."""
    return values[0]


@dataclass
class Rank:
    """One rank of one engine.

    Args:
        plan: the frozen plan.
        spec: the model adapter's record.
        mesh: process groups by axis.
        device, dtype: where and in what the denoiser runs.
        running: the call of the denoiser that runs; see `context`.
        sent: bytes that this rank sent, by axis name.
        slow: operations that made every rank wait although a strategy could have gone on, with their number.
        seconds: wall time of a job that is to be shown apart from encoding, denoising and decoding, by name.
        observer: told of everything that happens on this rank; by default nobody watches.
        pipe: the diffusers pipeline, once it is loaded.
    """

    plan: Plan
    spec: ModelSpec
    mesh: Mesh
    device: torch.device
    dtype: torch.dtype
    running: Running = field(default_factory=Running)
    sent: Counter[str] = field(default_factory=Counter)
    slow: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)
    observer: Observer = field(default_factory=Observer)
    pipe: Any = None
    _deciders: tuple[dist.ProcessGroup | None] | None = field(default=None, init=False, repr=False)

    @property
    def context(self) -> ForwardContext:
        """The context of the call of the denoiser that runs, or of the last one, for modules inside the denoiser.

        Wraps find the context in what they are called with.
        """
        return self.running.context

    @cached_property
    def shard(self) -> int:
        """This rank's coordinate over all axes that divide the tokens, outermost first."""
        index = 0
        for axis in self.plan.axes:
            if axis.shards_tokens:
                index = index * (axis.degree or 1) + self.mesh.index(axis.name)
        return index

    def began(self) -> int:
        """Return the time in ns at which an operation is started that will be waited for later."""
        return time.perf_counter_ns()

    def waiting(
        self, what: str, axis: str = "", group: Any = None, message: tuple[str, int, int] | None = None, began: int = 0
    ) -> AbstractContextManager[None]:
        """Return a context manager to put around each wait for other ranks. A hang is blamed on a rank outside it.

        Args:
            what: what is waited for, in words.
            axis, group: of a collective.
            message: channel, source and number of a message.
            began: of what was begun ahead, see `began`.
        """
        return self.observer.waiting(Awaited(what, axis or what, group, message, began))

    def group(self, axis: str) -> dist.ProcessGroup | None:
        """Process group along an axis, None where this rank is alone."""
        return self.mesh.group(axis)

    def index(self, axis: str) -> int:
        """Coordinate along an axis."""
        return self.mesh.index(axis)

    def degree(self, axis: str) -> int:
        """Size of an axis, 1 if there is no such axis."""
        return self.mesh.degrees.get(axis, 1)

    def wait_for_all(self, work: Any, alone: Callable[[str], XditError]) -> None:
        """Wait for a collective that other ranks may never enter, for half of the run's ``timeout`` at most.

        Args:
            work: handle of the collective.
            alone: makes the error that is raised if they do not come, from the time waited in words (``150 s``).
        """
        patience = timedelta(seconds=self.plan.run.patience / 2)
        try:
            work.wait(patience)
        except RuntimeError as error:
            if "timed out" not in str(error).lower() and "timeout" not in str(error).lower():
                raise  # a rank has gone
            raise alone(f"{patience.total_seconds():g} s") from error

    def agree(self, value: Decision, choose: Callable[[Sequence[Decision]], Decision] = first) -> Decision:
        """Return the same decision on all ranks that share a picture, even if each of them would decide differently.

        These ranks must enter the same collectives, or they wait for each other in vain. A strategy that decides from
        the numbers that it sees (such as a step cache that leaves out the blocks) therefore asks here. Call it equally
        often on every rank, in a wrap of ``forward``, before the blocks run. Inside the trunk a stage would wait for
        the stage after it, which waits for its rows. One call costs a small exchange, for which the host waits.

        Args:
            value: of this rank: a bool or a number that a float64 holds exactly.
            choose: makes one of the values of all ranks, in their order: by default the first, or ``max``, ``min``,
                ``any``, ``all``.

        Returns:
            The same on all ranks that share a picture, of the type that ``choose`` makes of values of this type.

        Raises:
            PluginError: ``value`` is no number, or the ranks asked in different steps.
            LockstepError: not all of them asked within half of the run's ``timeout``.
        """
        if not isinstance(value, (bool, int, float)):
            raise PluginError(
                f"rank.agree takes a bool or a number, and was given {value!r:.60}; decide on one of these."
            )
        if self._deciders is None:
            self._deciders = (self.mesh.decision_group(self.plan.picture_axes),)
        (group,) = self._deciders
        if group is None:
            return choose([value])
        mine = torch.tensor([value, self.context.step], dtype=torch.float64)
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]

        def alone(patience: str) -> LockstepError:
            return LockstepError(
                f"rank {self.mesh.rank} asked in step {self.context.step + 1} for an agreement that others did not "
                f"ask for within {patience}; call rank.agree on every rank equally often, in a wrap of the forward."
            )

        with self.waiting("all ranks of a picture to agree", "agree", group):
            self.wait_for_all(dist.all_gather(everyone, mine, group=group, async_op=True), alone)
        ranks = dist.get_process_group_ranks(group)
        steps = {r: int(x[1]) for r, x in zip(ranks, everyone, strict=True)}
        if len(set(steps.values())) > 1:
            asked = ", ".join(f"rank {r} in step {s + 1}" for r, s in steps.items())
            raise PluginError(
                f"the ranks of a picture asked for an agreement in different steps ({asked}); call rank.agree equally "
                "often."
            )
        return choose([type(value)(x[0].item()) for x in everyone])

    @cached_property
    def blocks(self) -> range:
        """Indices of the blocks that this rank holds."""
        stage = self.index(self.plan.stages) if self.plan.stages else 0
        start = sum(self.plan.split[:stage])
        return range(start, start + self.plan.split[stage])
