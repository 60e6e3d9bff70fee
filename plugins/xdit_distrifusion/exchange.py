"""What the patches tell each other: fresh in warm-up, of the step before past it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from xdit_core import Branch, Rank


@dataclass
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
        self.warmup, self.rank, self.now = warmup, rank, rank.now
        self.group, self.degree, self.index = (
            rank.group("distrifusion"),
            rank.degree("distrifusion"),
            rank.index("distrifusion"),
        )
        self.shared: dict[Branch, dict[Any, Kept]] = {}

    def kept(self, key: Any) -> Kept:
        """What is shared under that key in the branch in hand."""
        return self.shared.setdefault(self.now.branch, {}).setdefault(key, Kept())

    @contextmanager
    def request(self) -> Iterator[None]:
        """Around a call of the pipeline: nothing is shared before it or behind it."""
        try:
            yield
            for shared in self.shared.values():
                for kept in shared.values():
                    self.arrived(kept)
        finally:
            self.shared.clear()

    def whole(self, key: Any, cut: Callable[[], dict[int, torch.Tensor]]) -> None:
        """In warm-up on one rank all patches are computed at once; the last time, keep what the next step will want of
        each."""
        if self.now.branch.age == self.warmup - 1:
            self.kept(key).old = cut()

    def parts(self, key: Any, mine: torch.Tensor, sizes: Sequence[int], dim: int) -> dict[int, torch.Tensor]:
        """What this rank gives for its patch and has of the others, by patch.

        Args:
            key: tells apart what is shared in one call of the denoiser.
            mine: of the patch in hand, fresh.
            sizes: of each patch along ``dim``.
        """
        now, kept = self.now, self.kept(key)
        if now.branch.age < self.warmup:
            parts = dict(enumerate(self.gather(mine, sizes, dim, "distrifusion")))
            if now.branch.age == self.warmup - 1:
                kept.old = parts
            return parts
        if self.degree > 1:
            self.arrived(kept)
        elif kept.fresh.keys() >= set(range(now.layout.patches)):
            kept.old, kept.fresh = kept.fresh, {}
        parts = {**kept.old, now.patch or 0: mine}
        if self.degree == 1:
            kept.fresh[now.patch or 0] = mine
        else:
            self.post(kept, mine, sizes, dim)
        return dict(sorted(parts.items()))

    def post(self, kept: Kept, mine: torch.Tensor, sizes: Sequence[int], dim: int) -> None:
        """Begin to send what is fresh to the others, and to receive theirs, for the next step."""
        padded, parts = self.buffers(mine, sizes, dim)
        kept.pending = (dist.all_gather(parts, padded, group=self.group, async_op=True), padded, self.rank.began())
        kept.fresh = {m: part.narrow(dim, 0, n) for m, (part, n) in enumerate(zip(parts, sizes, strict=True))}
        self.rank.sent["distrifusion"] += mine.nbytes * (self.degree - 1)

    def arrived(self, kept: Kept) -> None:
        """What was sent in the step before is here."""
        if kept.pending is not None:
            work, _, began = kept.pending
            with self.rank.waiting(
                "what the patches share, of the step before", "distrifusion", self.group, began=began
            ):
                work.wait()
            kept.old, kept.fresh, kept.pending = kept.fresh, {}, None

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
