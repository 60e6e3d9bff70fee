"""DistriFusion on one rank: one patch of the picture, and what it needs of the others from the step before.

Shapes: latents ``[B, C, h, w]``, keys and values ``[B, H, S, D]``, both together ``[2, B, H, S, D]``.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

from xdit_core import (
    AttentionCall,
    AttentionRun,
    Built,
    ForwardCall,
    ForwardRun,
    Rank,
    length,
    materialized,
    positions,
    refuse_mask,
    spans_of,
)
from xdit_distrifusion.exchange import Exchange


class Patches:
    """The forward of one rank: its patch, or all patches one after the other where there is one rank.

    Sends per step: its part of the prediction.

    Args:
        exchange: between the patches.
        cuts_input: the denoiser is given the rows of the patch only, and not the whole picture of which it then looks
            at the patch.
    """

    def __init__(self, exchange: Exchange, cuts_input: bool) -> None:
        self.exchange, self.now, self.cuts_input = exchange, exchange.now, cuts_input

    def __call__(self, inner: ForwardRun, call: ForwardCall) -> torch.Tensor:
        """One call of the denoiser.

        Args:
            call: latents ``[B, C, h, w]``.

        Returns:
            The prediction at full shape, on every rank.
        """
        now, exchange = self.now, self.exchange
        dim = now.row_dim
        if call.elsewhere or now.layout.patches == 1:
            return inner(call)
        call = call.but(latents=materialized(call.latents))
        if exchange.degree == 1 and now.branch.age < exchange.warmup:
            return inner(call)
        parts = []
        try:
            for patch in range(now.layout.patches) if exchange.degree == 1 else [exchange.index]:
                now.patch = patch
                top, bottom = now.cuts[patch : patch + 2]
                mine = call.but(latents=call.latents.narrow(dim, top, bottom - top)) if self.cuts_input else call
                out = inner(mine)
                parts.append(out if self.cuts_input else out.narrow(dim, top, bottom - top).contiguous())
        finally:
            now.patch = None
        if exchange.degree > 1:
            parts = exchange.gather(parts[0], [b - a for a, b in pairwise(now.cuts)], dim, "distrifusion.latents")
        return torch.cat(parts, dim=dim)


class KeysAndValues:
    """Attend to fresh rows of the own patch and to those of the step before of all others; in warm-up to fresh rows of
    all.

    Sends per rank and block: ``2 x B x S/N x H x D`` elements to each of the others, while the ranks compute.
    """

    def __init__(self, exchange: Exchange) -> None:
        self.exchange, self.now = exchange, exchange.now

    def __call__(self, inner: AttentionRun, call: AttentionCall) -> Any:
        """One attention call.

        Args:
            call: q, k, v with the rows of the patch in hand; text rows come with patch 0.
        """
        now, key = self.now, (call.block, call.ordinal)
        if now.layout.patches == 1:
            return inner(call)
        refuse_mask(call, "distrifusion")
        kv = torch.stack((call.k, call.v))
        if now.patch is None:
            self.exchange.whole(key, lambda: self.cut(kv, call))
            return inner(call)
        rows = [sum(length(spans_of(now, call.kind, m, s)) for s in call.shards) for m in range(now.layout.patches)]
        parts = self.exchange.parts(key, kv, rows, 3)
        k, v = torch.cat(list(parts.values()), dim=3)
        order = tuple(parts)

        def rows(shards: tuple[int, ...]) -> torch.Tensor:
            return torch.cat([positions(now, call.kind, m, shards) for m in order])

        return inner(call.but(k=k, v=v, patches=order, rows=rows))

    def cut(self, kv: torch.Tensor, call: AttentionCall) -> dict[int, torch.Tensor]:
        """Keys and values of the whole picture by patch."""
        here = positions(self.now, call.kind, None, call.shards)
        place = torch.empty(int(here.max()) + 1, dtype=torch.int64)
        place[here] = torch.arange(len(here))
        index = [place[positions(self.now, call.kind, m, call.shards)] for m in range(self.now.layout.patches)]
        return {m: kv.index_select(3, i.to(kv.device)) for m, i in enumerate(index)}


def build(warmup: int, rank: Rank) -> Built:
    """The wraps of one rank, for a stack of transformer blocks or for a U-Net."""
    exchange = Exchange(warmup, rank)
    if rank.plan.facts.blocks:
        wraps = {"forward/patches": Patches(exchange, False), "attention/cache": KeysAndValues(exchange)}
        return Built(wraps=wraps, request=exchange.request)
    from xdit_distrifusion.unet import neighbours

    wraps = {"forward/patches": Patches(exchange, True)}
    transforms = {"adapt": lambda denoiser: neighbours(denoiser, exchange)}
    return Built(wraps=wraps, transforms=transforms, request=exchange.request)
