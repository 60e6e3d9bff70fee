"""End a request early, at the same step on all ranks that work on a picture together.

Before each step, every rank passes a checkpoint. At its own checkpoint ``c``, before it computes, the rank that owns
the picture says through a store whether checkpoint ``c + 2`` may be passed or ends the request; every other rank reads
that word before it passes. So nobody can have passed the checkpoint at which a request ends, and no collective is
needed. A rank waits for the word only if it is two steps ahead of the owner: a stage of PipeFusion never is, but a rank
that has nothing to compute while guidance is off would be.

It cannot come to a deadlock. What the owner needs of a rank to come to its checkpoint ``c`` was sent in steps before
``c``; and a rank that waits at checkpoint ``c + 2`` has evaluated, and therefore sent, everything of these steps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist

from xdit_core.errors import XditError
from xdit_core.parallel.placements import evaluated

AHEAD = 2  # checkpoints from the owner's word to where it holds
KEPT = 8  # requests whose words stay in the store, for ranks that are behind
GO_ON, END = b"go on", b"end"


class Cancelled(Exception):
    """Raised to leave the pipeline at a checkpoint."""


class Left(Exception):
    """Raised to leave the pipeline before its end.

    Args:
        latents: the result, if latents were asked for and are complete.
        failure: why there is no result; None on a rank that does not make it.
    """

    def __init__(self, latents: torch.Tensor | None = None, failure: XditError | None = None) -> None:
        super().__init__()
        self.latents, self.failure = latents, failure


def finite(x: torch.Tensor, what: str, dtype: torch.dtype) -> torch.Tensor:
    """Check that a tensor holds finite numbers, since the picture would otherwise be black.

    Args:
        what: the tensor, in words.
        dtype: in which the denoiser computes.

    Raises:
        Left: some values are not finite.
    """
    if not torch.isfinite(x).all():
        mend = "" if dtype == torch.float32 else "use dtype=float32, or "
        if dtype == torch.float16:
            mend = "use dtype=bfloat16 or float32, or "
        name = str(dtype).removeprefix("torch.")
        sentence = (
            f"{what} came out as not a number or infinite in {name}, which would be a black picture; {mend}take a "
            "lower guidance, more steps or another scheduler."
        )
        raise Left(failure=XditError(sentence))
    return x


class Cancellation:
    """The checkpoints of one rank.

    Args:
        rank: number of this rank.
        owner: the rank that owns the pictures on which this one works.
        store: read and written by all ranks of a picture; None if this rank works on its pictures alone.
        shows: the latents of a step are wanted even if the request cannot be cancelled.
        waiting: makes a context that is entered while this rank waits for what is said in words.
    """

    def __init__(
        self,
        rank: int,
        owner: int,
        store: Any,
        shows: bool,
        waiting: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        self._owner, self._decides = owner, rank == owner
        self._store, self._shows, self._waiting = store, shows, waiting
        self._asked: Callable[[], bool] | None = None
        self._requests, self._checkpoints = 0, 0
        self._end: int | None = None
        self._written: deque[list[str]] = deque()  # keys of the last requests
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
        if asked is not None and self._decides and self._store is not None:
            self._written.append([])
            if len(self._written) > KEPT:
                for key in self._written.popleft():
                    self._store.delete_key(key)

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
        """
        if self._asked is None and not self._shows:
            return None
        last, before = self._latents
        self._latents = (last, last)
        complete = evaluated(before)
        if self._asked is not None:
            here, self._checkpoints = self._checkpoints, self._checkpoints + 1
            if self._ends_at(here, self._asked):
                raise Cancelled
        return complete

    def _ends_at(self, here: int, asked: Callable[[], bool]) -> bool:
        """Whether the request ends at this checkpoint; the owner says whether it ends at a later one."""
        if self._store is None:
            return asked()
        if not self._decides:
            if here < AHEAD:
                return False
            with self._waiting(f"rank {self._owner} to say whether the request goes on"):
                word: bytes = self._store.get(self._key(here))
            return word == END
        if self._end is None:
            ends = asked()
            key = self._key(here + AHEAD)
            self._store.set(key, END if ends else GO_ON)
            self._written[-1].append(key)
            self._end = here + AHEAD if ends else None
        return here == self._end

    def _key(self, checkpoint: int) -> str:
        return f"{self._owner}/{self._requests}/{checkpoint}"


def store_of_group() -> Any:
    """A part of the store through which the ranks have met, for one more engine of each rank; None without a group."""
    if not dist.is_initialized():
        return None
    from torch.distributed.distributed_c10d import _get_default_store  # torch has no public name for it

    store = _get_default_store()
    number = store.add(f"xdit-engines/{dist.get_rank()}", 1)  # all ranks make their engines in one order
    return dist.PrefixStore(f"xdit-engine-{number}", store)  # type: ignore[attr-defined]


__all__ = ["Cancellation", "Cancelled", "store_of_group"]
