"""Branches: the conditions that the denoiser is called with, told apart over the evaluations and steps of a job.

An *evaluation* is what a pipeline does between two calls of ``scheduler.step``; a step of a second-order scheduler has
two. Within an evaluation the denoiser may be called several times with different conditions (the prompt, the negative
prompt, the prompt with some blocks skipped), and what strategies keep from step to step belongs to one of these.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch.utils._pytree import tree_leaves

from xdit_core.errors import UnsupportedCall

MOST = 16  # branches of a job; no pipeline has more conditions

Kept = TypeVar("Kept")


@dataclass(eq=False)
class BranchState:
    """One condition over the steps of a job, and what strategies keep for it from step to step.

    The core drops it when the job, which is one call of the pipeline, ends. It is compared and hashed by identity.

    Args:
        number: counted from 0 in the order of first use, over all denoisers of the pipeline.
        steps_done: in how many earlier steps of the job the denoiser was called with this condition.
    """

    number: int = 0
    steps_done: int = 0
    _kept: dict[Any, Any] = field(default_factory=dict, repr=False)

    def keep(self, key: Any, make: Callable[[], Kept]) -> Kept:
        """Return what is kept under a key in this job; it is made on first use.

        Args:
            key: hashable; begins with the object that owns it, as ``(self, block)``, or with the name of the plugin, so
                that two strategies never use the same key.
            make: called without arguments if there is nothing yet.
        """
        if key not in self._kept:
            self._kept[key] = make()
        kept: Kept = self._kept[key]
        return kept


@dataclass
class _Entry:
    branch: BranchState
    key: tuple[Any, ...]
    condition: list[torch.Tensor]
    step: int
    evaluation: int


class Branches:
    """Finds the branch of a call of the denoiser.

    Two calls belong to one branch if they agree in denoiser, skipped blocks, batch and the *values* of the condition,
    and are not made in the same evaluation: a second call with the same condition (guidance on an image that the
    latents hold) is another branch.
    """

    def __init__(self) -> None:
        self._entries: list[_Entry] = []
        self._evaluation = 0

    def clear(self) -> None:
        """Forget those of the last job."""
        self._entries.clear()
        self._evaluation = 0

    def stepped(self) -> None:
        """The scheduler made a step; another evaluation begins."""
        self._evaluation += 1

    def find(self, key: tuple[Any, ...], condition: Any, step: int) -> BranchState:
        """The branch of a call.

        Args:
            key: what else tells calls apart, compared by value: denoiser, skipped blocks, batch.
            condition: a tensor, or nested sequences of tensors.
            step: how many steps of the job are done.

        Raises:
            UnsupportedCall: there is a new condition at every step, or the pipeline never calls ``scheduler.step``.
        """
        tensors = [x for x in tree_leaves(condition) if isinstance(x, torch.Tensor)]
        for entry in self._entries:
            if entry.key == key and entry.evaluation != self._evaluation and equal(entry.condition, tensors):
                entry.condition, entry.evaluation = tensors, self._evaluation
                entry.branch.steps_done += entry.step != step
                entry.step = step
                return entry.branch
        if len(self._entries) >= MOST:
            raise UnsupportedCall(
                f"the pipeline called its {key[0]} with more than {MOST} conditions, so what was kept of earlier "
                "steps cannot be told apart; pass the same condition at every step, and call scheduler.step once for "
                "each step."
            )
        self._entries.append(_Entry(BranchState(len(self._entries)), key, tensors, step, self._evaluation))
        return self._entries[-1].branch


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    """The same values; tensors that are the same object are not read, which on a GPU would make the host wait."""
    return len(a) == len(b) and all(
        x is y or (x.shape == y.shape and x.dtype == y.dtype and x.device == y.device and torch.equal(x, y))
        for x, y in zip(a, b, strict=True)
    )


@contextmanager
def watched(
    scheduler: Any, stepped: Callable[[Any], None], around: AbstractContextManager[Any] | None = None
) -> Iterator[None]:
    """Call ``stepped`` with the result of every ``scheduler.step`` inside the block.

    Args:
        around: entered for each step, again and again.

    The class is exchanged and not the method of the instance, so that a copy that the pipeline makes steps on its own
    state.
    """
    original = type(scheduler)
    if not hasattr(original, "step"):
        yield
        return

    @functools.wraps(original.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        with around or nullcontext():
            result = original.step(self, *args, **kwargs)
        stepped(result)
        return result

    scheduler.__class__ = type(original.__name__, (original,), {"step": step, "__module__": original.__module__})
    try:
        yield
    finally:
        scheduler.__class__ = original
