"""End a request early, at the same step on all ranks that work on a picture together.

Before each step, every rank passes a checkpoint. The rank that owns the picture asks whether to go on. If not, it
writes into a store that all ranks read: the request ends two checkpoints further on. Then it computes its step. No rank
can come to that checkpoint without what the owner has computed in the step after the decision, so by then the decision
is there to be read, and no collective is needed. It holds for PipeFusion too, whose stages are at different steps: a
rank that runs ahead of the others waits at each checkpoint for the latents of the step before the last.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from xdit_core.errors import XditError
from xdit_core.parallel.patch_tensor import PatchTensor
from xdit_core.plan import Plan

AHEAD = 2  # checkpoints from the decision to the end


class Cancelled(Exception):
    """Raised to leave the pipeline at a checkpoint."""


class Cancellation:
    """The checkpoints of one rank.

    Args:
        plan: of the engine.
        rank: number of this rank.
        store: read and written by all ranks; None if the plan has one rank.
        shows: the latents of a step are wanted even if the request cannot be cancelled.
    """

    def __init__(self, plan: Plan, rank: int, store: Any = None, shows: bool = False) -> None:
        self._shows = shows
        self.owner, self.alone = owner_of(plan, rank), plan.ranks_of_a_picture == 1
        self.decides, self._store = rank == self.owner, store
        self._asked: Callable[[], bool] | None = None
        self._requests, self._checkpoints = 0, 0
        self._end: int | None = None
        self._written = ""
        self._latents: tuple[Any, Any] = (None, None)  # of the last step, and of the one before

    def begin(self, asked: Callable[[], bool] | None) -> None:
        """Another request begins.

        Args:
            asked: returns whether the request is to end; None if it cannot be cancelled. All ranks give a function, or
                none does; that of ranks which own no picture is not called.
        """
        self._asked, self._checkpoints, self._end = asked, 0, None
        self._requests += 1
        self.forget()

    def forget(self) -> None:
        """Drop the latents of a call of the pipeline."""
        self._latents = (None, None)

    def stepped(self, result: Any) -> None:
        """The scheduler made a step and returned this."""
        latents = result[0] if isinstance(result, tuple) else getattr(result, "prev_sample", None)
        self._latents = (latents, self._latents[1])

    @property
    def latents(self) -> Any:
        """What the scheduler returned last; None before its first step."""
        return self._latents[0]

    def checkpoint(self) -> torch.Tensor | None:
        """Go on with the next step, or leave.

        Returns:
            The latents of the step before the last, on ranks that have them.

        Raises:
            Cancelled: the request ends here.
            XditError: this rank is further than the decision, so that the others cannot end where it does.
        """
        if self._asked is None and not self._shows:
            return None
        last, before = self._latents
        self._latents = (last, last)
        complete = evaluated(before)
        if self._asked is None:
            return complete
        if self.decides:
            self._decide(self._asked)
        else:
            self._read()
        here, self._checkpoints = self._checkpoints, self._checkpoints + 1
        if self._end is not None and here >= self._end:
            if here > self._end and not self.alone and not idle(last):
                raise XditError(
                    f"the request was cancelled at checkpoint {self._end}, which this rank had passed ({here}); start "
                    "the ranks again, and report this as a mistake of xdit."
                )
            raise Cancelled
        return complete

    def ended(self) -> bool:
        """Whether the request has ended early; asked behind a call of the pipeline.

        A rank that had nothing to compute may have come to the end of the loop where the others left it.
        """
        if self._asked is None:
            return False
        if not self.decides:
            self._read()
        return self._end is not None and self._checkpoints > self._end

    def _decide(self, asked: Callable[[], bool]) -> None:
        if self._end is not None or not asked():
            return
        if self.alone or self._store is None:
            self._end = self._checkpoints
            return
        self._end = self._checkpoints + AHEAD
        if self._written:
            self._store.delete_key(self._written)
        self._written = self._key
        self._store.set(self._written, str(self._end))

    def _read(self) -> None:
        if self._end is None and self._store is not None and self._store.check([self._key]):
            self._end = int(self._store.get(self._key))

    @property
    def _key(self) -> str:
        return f"cancelled/{self.owner}/{self._requests}"


def owner_of(plan: Plan, rank: int) -> int:
    """The rank that owns the pictures on which a rank works."""
    at, owner = plan.coordinates(rank), 0
    for axis in plan.axes:
        owner = owner * (axis.degree or 1) + (0 if axis.name in plan.picture_axes else at[axis.name])
    return owner


def idle(latents: Any) -> bool:
    """Whether this rank never has the values of these latents, and so may have run ahead of those that compute them."""
    return isinstance(latents, PatchTensor) and not latents.placement.evaluates


def evaluated(latents: Any) -> torch.Tensor | None:
    """The values of latents where this rank has them, without an exchange; a patch that is under way is waited for."""
    if isinstance(latents, PatchTensor):
        rows: torch.Tensor | None = None if idle(latents) else latents.rows(0, latents.bounds[-1])
        return rows
    return latents if isinstance(latents, torch.Tensor) else None


def store_of_group() -> Any:
    """A part of the store through which the ranks have met, for one more engine of each rank; None without a group."""
    if not dist.is_initialized():
        return None
    from torch.distributed.distributed_c10d import _get_default_store  # torch has no public name for it

    store = _get_default_store()
    number = store.add(f"xdit-engines/{dist.get_rank()}", 1)  # all ranks make their engines in one order
    return dist.PrefixStore(f"xdit-engine-{number}", store)  # type: ignore[attr-defined]


__all__ = ["Cancellation", "Cancelled", "evaluated", "owner_of", "store_of_group"]
