"""What the patches tell each other: fresh in warm-up, of the step before past it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from xdit_core import ForwardContext, Rank


@dataclass(eq=False)
class Kept:
    """One thing that the patches share, by patch; ``fresh`` is on its way or of this step, ``old`` of the step
    before."""

    old: dict[int, torch.Tensor] = field(default_factory=dict)
    fresh: dict[int, torch.Tensor] = field(default_factory=dict)
    pending: Any = None


class Exchange:
    """Shares things between the patches. With one rank and several patches it keeps what as many ranks would.

    Args:
        warmup: synchronous steps.
        rank: this rank.
    """

    def __init__(self, warmup: int, rank: Rank) -> None:
        self.warmup, self.rank, self.group = warmup, rank, rank.group("distrifusion")
        self.degree, self.index = rank.degree("distrifusion"), rank.index("distrifusion")
        self.pending: set[Kept] = set()

    def kept(self, context: ForwardContext, key: Any) -> Kept:
        """What is shared under a key in the branch of a call."""
        return context.branch.keep((self, key), Kept)

    @contextmanager
    def request(self) -> Iterator[None]:
        """Around a call of the pipeline: nothing is shared before it or behind it."""
        try:
            yield
            for kept in tuple(self.pending):
                self.arrived(kept)
        finally:
            self.pending.clear()

    def whole(self, context: ForwardContext, key: Any, cut: Callable[[], dict[int, torch.Tensor]]) -> None:
        """In warm-up on one rank all patches are computed at once; the last time, keep what the next step will want of
        each."""
        if context.branch.steps_done == self.warmup - 1:
            self.kept(context, key).old = cut()

    def parts(
        self, context: ForwardContext, key: Any, mine: torch.Tensor, sizes: Sequence[int], dim: int
    ) -> dict[int, torch.Tensor]:
        """What this rank gives for its patch and has of the others, by patch.

        Args:
            key: tells apart what is shared in one call of the denoiser.
            mine: of the patch in hand, fresh.
            sizes: of each patch along ``dim``.
        """
        kept, patch = self.kept(context, key), context.patch or 0
        if context.branch.steps_done < self.warmup:
            parts = dict(enumerate(self.gather(mine, sizes, dim, "distrifusion")))
            if context.branch.steps_done == self.warmup - 1:
                kept.old = parts
            return parts
        if self.degree > 1:
            self.arrived(kept)
        elif kept.fresh.keys() >= set(range(context.layout.patches)):
            kept.old, kept.fresh = kept.fresh, {}
        parts = {**kept.old, patch: mine}
        if self.degree == 1:
            kept.fresh[patch] = mine
        else:
            self.post(kept, mine, sizes, dim)
        return dict(sorted(parts.items()))

    def post(self, kept: Kept, mine: torch.Tensor, sizes: Sequence[int], dim: int) -> None:
        """Begin to send what is fresh to the others, and to receive theirs, for the next step."""
        padded, parts = self.buffers(mine, sizes, dim)
        kept.pending = (dist.all_gather(parts, padded, group=self.group, async_op=True), padded, self.rank.began())
        kept.fresh = {m: part.narrow(dim, 0, n) for m, (part, n) in enumerate(zip(parts, sizes, strict=True))}
        self.rank.sent["distrifusion"] += mine.nbytes * (self.degree - 1)
        self.pending.add(kept)

    def arrived(self, kept: Kept) -> None:
        """What was sent in the step before is here."""
        if kept.pending is not None:
            work, _, began = kept.pending
            with self.rank.waiting(
                "what the patches share, of the step before", "distrifusion", self.group, began=began
            ):
                work.wait()
            kept.old, kept.fresh, kept.pending = kept.fresh, {}, None
            self.pending.discard(kept)

    def gather(self, mine: torch.Tensor, sizes: Sequence[int], dim: int, name: str) -> list[torch.Tensor]:
        """The parts of all ranks, now; ``sizes`` along ``dim`` of each."""
        padded, parts = self.buffers(mine, sizes, dim)
        with self.rank.waiting("the patches of the other ranks", "distrifusion", self.group):
            dist.all_gather(parts, padded, group=self.group)
        self.rank.sent[name] += mine.nbytes * (self.degree - 1)
        return [part.narrow(dim, 0, n) for part, n in zip(parts, sizes, strict=True)]

    def buffers(self, mine: torch.Tensor, sizes: Sequence[int], dim: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """All parts at the size of the largest: all_gather wants equal shapes."""
        most = max(sizes)
        if mine.shape[dim] < most:
            shape = list(mine.shape)
            shape[dim] = most - shape[dim]
            mine = torch.cat((mine, mine.new_zeros(shape)), dim=dim)
        mine = mine.contiguous()
        return mine, [torch.empty_like(mine) for _ in sizes]
