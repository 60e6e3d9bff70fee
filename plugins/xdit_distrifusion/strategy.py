"""The wraps of DistriFusion: each rank computes one patch, and attends to all patches.

Past the warm-up it takes the keys and values of the other patches from the step before, see ``exchange``.

Shapes: latents ``[B, C, h, w]``, keys and values ``[B, H, S, D]``, both together ``[2, B, H, S, D]``.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

from xdit_core import (
    AttentionCall,
    Built,
    ForwardCall,
    Rank,
    RunAttention,
    RunForward,
    materialized,
    refuse_mask,
    share_between_patches,
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
        self.exchange, self.cuts_input = exchange, cuts_input

    def __call__(self, inner: RunForward, call: ForwardCall) -> torch.Tensor:
        """One call of the denoiser.

        Args:
            call: latents ``[B, C, h, w]``.

        Returns:
            The prediction at full shape, on every rank.
        """
        context, exchange = call.context, self.exchange
        dim, patches = context.row_dim, context.layout.patches
        if call.on_other_ranks or patches == 1:
            return inner(call)
        call = call.but(latents=materialized(call.latents))
        if exchange.degree == 1 and context.branch.steps_done < exchange.warmup:
            return inner(call)
        parts = []
        for patch in range(patches) if exchange.degree == 1 else [exchange.index]:
            top, bottom = context.cuts[patch : patch + 2]
            latents = call.latents.narrow(dim, top, bottom - top) if self.cuts_input else call.latents
            prediction = inner(call.of_patch(patch, latents))
            parts.append(prediction if self.cuts_input else prediction.narrow(dim, top, bottom - top).contiguous())
        if exchange.degree > 1:
            sizes = [bottom - top for top, bottom in pairwise(context.cuts)]
            parts = exchange.gather(parts[0], sizes, dim, "distrifusion.latents")
        return torch.cat(parts, dim=dim)


class KeysAndValues:
    """Attend to fresh rows of the own patch and to those of the step before of all others; in warm-up to fresh rows of
    all.

    Sends per rank and block: ``2 x B x S/N x H x D`` elements to each of the others, while the ranks compute.
    """

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange

    def __call__(self, inner: RunAttention, call: AttentionCall) -> Any:
        """One attention call.

        Args:
            call: q, k, v with the rows of the patch in hand; text rows come with patch 0.
        """
        context, key = call.context, (call.block, call.ordinal)
        if context.layout.patches == 1:
            return inner(call)
        refuse_mask(call, "distrifusion")
        kv = torch.stack((call.k, call.v))
        rows = [call.keys.but(patches=(patch,)) for patch in range(context.layout.patches)]
        if context.patch is None:
            self.exchange.keep_whole(
                context,
                key,
                lambda: {m: kv.index_select(3, part.index_in(call.keys).to(kv.device)) for m, part in enumerate(rows)},
            )
            return inner(call)
        parts = self.exchange.parts(context, key, kv, [len(part) for part in rows], 3)
        k, v = torch.cat(list(parts.values()), dim=3)
        return inner(call.but(k=k, v=v, keys=call.keys.but(patches=tuple(parts))))


def build(warmup: int, rank: Rank) -> Built:
    """The wraps of one rank, for a stack of transformer blocks or for a U-Net."""
    exchange = Exchange(warmup, rank)
    if rank.plan.facts.blocks:
        wraps: dict[str, Callable[..., Any]] = {
            "forward/patches": Patches(exchange, False),
            "attention/cache": KeysAndValues(exchange),
        }
        return Built(wraps=wraps, job=exchange.job)
    wraps = {"forward/patches": Patches(exchange, True)}
    transforms = {"adapt": lambda denoiser: share_between_patches(denoiser, exchange)}
    return Built(wraps=wraps, transforms=transforms, job=exchange.job)
