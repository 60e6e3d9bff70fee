"""Exchanges what patches need of each other: that of the same step in warm-up, later that of the step before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from xdit_core import ForwardContext, Rank, gather_parts

Parts = dict[int, torch.Tensor]  # by patch


@dataclass(eq=False)
class Shared:
    """One thing that the patches share: of the step before, and of this step, perhaps still on its way."""

    old: Parts = field(default_factory=dict)
    new: Parts = field(default_factory=dict)
    arriving: Any = None


class Exchange:
    """Shares things between the patches. One rank with several patches keeps what as many ranks would.

    Args:
        warmup: synchronous steps.
        rank: this rank.
    """

    def __init__(self, warmup: int, rank: Rank) -> None:
        self.warmup, self.rank, self.group = warmup, rank, rank.group("distrifusion")
        # what is gathered at once must not queue behind what arrives in the next step
        self.urgent = rank.mesh.second_group("distrifusion")
        self.degree, self.index = rank.degree("distrifusion"), rank.index("distrifusion")
        self._arriving: set[Shared] = set()

    @contextmanager
    def job(self) -> Iterator[None]:
        """Surround a job: at its end, wait for all that is on its way."""
        try:
            yield
            for shared in tuple(self._arriving):
                self.wait_for(shared)
        finally:
            self._arriving.clear()

    def shared(self, context: ForwardContext, key: Any) -> Shared:
        """Return what is shared under a key in the branch of a call."""
        return context.branch.keep((self, key), Shared)

    def keep_whole(self, context: ForwardContext, key: Any, cut: Callable[[], Parts]) -> None:
        """Behind the last synchronous step of one rank, which computes all patches at once: keep the parts of each."""
        if context.branch.steps_done == self.warmup - 1:
            self.shared(context, key).old = cut()

    def parts(self, context: ForwardContext, key: Any, mine: torch.Tensor, sizes: Sequence[int], dim: int) -> Parts:
        """Share what this rank computed for its patch; return this, and what it has of the other patches.

        Sends ``mine`` to each of the other ranks; past the warm-up it arrives while they compute.

        Args:
            context: of the call of the denoiser.
            key: tells apart what is shared in one call.
            mine: of the patch that is computed.
            sizes: of each patch along ``dim``.
        """
        shared, patch = self.shared(context, key), context.patch or 0
        if context.branch.steps_done < self.warmup:
            parts = dict(enumerate(self.gather(mine, sizes, dim, "distrifusion")))
            if context.branch.steps_done == self.warmup - 1:
                shared.old = parts
            return parts
        if self.degree == 1:
            if len(shared.new) == context.layout.patches:
                shared.old, shared.new = shared.new, {}
            shared.new[patch] = mine
            return dict(sorted({**shared.old, patch: mine}.items()))
        self.wait_for(shared)
        parts = dict(sorted({**shared.old, patch: mine}.items()))
        coming, handle = gather_parts(mine, sizes, dim, self.group, async_op=True)
        shared.new, shared.arriving = dict(enumerate(coming)), (handle, self.rank.began())
        self._arriving.add(shared)
        self.rank.sent["distrifusion"] += mine.nbytes * (self.degree - 1)
        return parts

    def wait_for(self, shared: Shared) -> None:
        """Wait for what was sent in the step before."""
        if shared.arriving is None:
            return
        (work, _), began = shared.arriving
        with self.rank.waiting("the patches of the step before", "distrifusion", self.group, began=began):
            work.wait()
        shared.old, shared.new, shared.arriving = shared.new, {}, None
        self._arriving.discard(shared)

    def gather(self, mine: torch.Tensor, sizes: Sequence[int], dim: int, name: str) -> list[torch.Tensor]:
        """Gather the parts that all ranks computed in this step; bytes are counted under ``name``."""
        with self.rank.waiting("the patches of the other ranks", "distrifusion", self.urgent):
            parts, _ = gather_parts(mine, sizes, dim, self.urgent)
        self.rank.sent[name] += mine.nbytes * (self.degree - 1)
        return parts
