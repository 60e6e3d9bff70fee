"""DistriFusion on one rank: one patch of the picture, keys and values of the others from the step before.

Shapes: latents ``[B, C, h, w]``, keys and values ``[B, H, S, D]``, both together ``[2, B, H, S, D]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist

from xdit_core import (
    Attend,
    AttentionRun,
    Built,
    Call,
    ForwardRun,
    Rank,
    length,
    materialized,
    positions,
    refuse_mask,
    spans_of,
)


@dataclass
class Kept:
    """Keys and values of one attention call, by patch; ``fresh`` are on their way or of this step, ``old`` of the step before."""

    old: dict[int, torch.Tensor] = field(default_factory=dict)
    fresh: dict[int, torch.Tensor] = field(default_factory=dict)
    pending: Any = None


@dataclass
class Flow:
    """What one branch (one condition of a step) carries from step to step."""

    step: int = -1
    kept: dict[tuple[int, int], Kept] = field(default_factory=dict)


class DistriFusion:
    """The wraps of one rank. With one rank and several patches it computes what as many ranks would.

    Sends per rank and block: ``2 x B x S/N x H x D`` elements to each of the others, while the ranks compute; per step its part of the
    prediction.

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
        self.flows: dict[Any, Flow] = {}

    def built(self) -> Built:
        """For the core."""
        return Built(
            wraps={"forward/patches": self.patch, "attention/cache": self.cached}, begin=self.flows.clear, end=self.end
        )

    def end(self) -> None:
        """A request went through: wait for every handle, free the buffers."""
        for flow in self.flows.values():
            for kept in flow.kept.values():
                self.arrived(kept)
        self.flows.clear()

    # forward

    def patch(self, inner: ForwardRun, call: Call) -> torch.Tensor:
        """One call of the denoiser: this rank's patch, or all patches one after the other where there is one rank.

        Args:
            call: latents ``[B, C, h, w]``.

        Returns:
            The prediction at full shape, on every rank.
        """
        now = self.now
        flow = self.flows.setdefault(now.branch, Flow())
        flow.step += 1
        if call.elsewhere or now.layout.patches == 1:
            return inner(call)
        call = call.but(latents=materialized(call.latents))
        if self.degree == 1 and flow.step < self.warmup:
            return inner(call)
        mine = range(now.layout.patches) if self.degree == 1 else [self.index]
        parts = []
        try:
            for patch in mine:
                now.patch = patch
                out = inner(call)
                top, bottom = now.cuts[patch : patch + 2]
                parts.append(out.narrow(now.row_dim, top, bottom - top).contiguous())
        finally:
            now.patch = None
        if self.degree > 1:
            parts = self.gather(parts[0], [b - a for a, b in pairwise(now.cuts)], now.row_dim, "distrifusion.latents")
        return torch.cat(parts, dim=now.row_dim)

    # attention

    def cached(self, inner: AttentionRun, call: Attend) -> Any:
        """Attend to fresh rows of the own patch and to those of the step before of all others; in warm-up to fresh rows of all.

        Args:
            call: q, k, v with the rows of the patch in hand; text rows come with patch 0.
        """
        now, flow = self.now, self.flows[self.now.branch]
        if now.layout.patches == 1:
            return inner(call)
        refuse_mask(call, "distrifusion")
        kept = flow.kept.setdefault((call.block, call.ordinal), Kept())
        kv = torch.stack((call.k, call.v))
        if now.patch is None:  # warm-up on one rank
            if flow.step == self.warmup - 1:
                kept.old = self.cut(kv, call)
            return inner(call)
        rows = [sum(length(spans_of(now, call.kind, m, s)) for s in call.shards) for m in range(now.layout.patches)]
        if flow.step < self.warmup:
            parts = dict(enumerate(self.gather(kv, rows, 3, "distrifusion")))
            if flow.step == self.warmup - 1:
                kept.old = parts
            return self.attend(inner, call, parts)
        if self.degree > 1:
            self.arrived(kept)
        elif kept.fresh.keys() >= set(range(now.layout.patches)):
            kept.old, kept.fresh = kept.fresh, {}
        parts = {**kept.old, now.patch: kv}
        if self.degree == 1:
            kept.fresh[now.patch] = kv
        else:
            self.post(kept, kv, rows)
        return self.attend(inner, call, parts)

    def attend(self, inner: AttentionRun, call: Attend, parts: dict[int, torch.Tensor]) -> Any:
        """Attend to the keys and values of some patches."""
        order = sorted(parts)
        kv = torch.cat([parts[m] for m in order], dim=3)
        return inner(call.but(k=kv[0], v=kv[1], patches=tuple(order)))

    def cut(self, kv: torch.Tensor, call: Attend) -> dict[int, torch.Tensor]:
        """Keys and values of the whole picture by patch."""
        here = positions(self.now, call.kind, None, call.shards)
        place = torch.empty(int(here.max()) + 1, dtype=torch.int64)
        place[here] = torch.arange(len(here))
        index = [place[positions(self.now, call.kind, m, call.shards)] for m in range(self.now.layout.patches)]
        return {m: kv.index_select(3, i.to(kv.device)) for m, i in enumerate(index)}

    def post(self, kept: Kept, kv: torch.Tensor, rows: Sequence[int]) -> None:
        """Begin to send the fresh keys and values to the others, and to receive theirs, for the next step."""
        mine, parts = self.buffers(kv, rows, 3)
        kept.pending = (dist.all_gather(parts, mine, group=self.group, async_op=True), mine)
        kept.fresh = {m: part.narrow(3, 0, n) for m, (part, n) in enumerate(zip(parts, rows, strict=True))}
        self.rank.sent["distrifusion"] += kv.nbytes * (self.degree - 1)

    def arrived(self, kept: Kept) -> None:
        """What was sent in the step before is here."""
        if kept.pending is not None:
            with self.rank.waiting("keys and values of the step before"):
                kept.pending[0].wait()
            kept.old, kept.fresh, kept.pending = kept.fresh, {}, None

    # both

    def gather(self, mine: torch.Tensor, rows: Sequence[int], dim: int, name: str) -> list[torch.Tensor]:
        """The parts of all ranks, now; ``rows`` along ``dim`` of each."""
        padded, parts = self.buffers(mine, rows, dim)
        with self.rank.waiting("the patches of the other ranks"):
            dist.all_gather(parts, padded, group=self.group)
        self.rank.sent[name] += mine.nbytes * (self.degree - 1)
        return [part.narrow(dim, 0, n) for part, n in zip(parts, rows, strict=True)]

    def buffers(self, mine: torch.Tensor, rows: Sequence[int], dim: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """All parts at the size of the largest: all_gather wants equal shapes."""
        most = max(rows)
        if mine.shape[dim] < most:
            shape = list(mine.shape)
            shape[dim] = most - shape[dim]
            mine = torch.cat((mine, mine.new_zeros(shape)), dim=dim)
        mine = mine.contiguous()
        return mine, [torch.empty_like(mine) for _ in rows]
