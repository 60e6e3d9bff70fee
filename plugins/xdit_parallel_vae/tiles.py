"""Tiles over ranks: each rank decodes some of the overlapping tiles into which diffusers cuts a large picture.

The result equals diffusers' own with ``vae.enable_tiling()``, which differs a little from that of the whole picture:
norms and attention see one tile at a time.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from distvae.utils import parallel_context
from distvae.vae import sharing, supports_tile_parallel, tiled_decode_for
from torch import nn
from torch.func import functional_call
from torch.utils._pytree import tree_map_only


def deal_tiles(vae: Any, group: dist.ProcessGroup | None) -> bool:
    """Turn tiling on and deal the tiles out to the ranks of the group; False if this VAE cannot."""
    if not callable(getattr(vae, "tiled_decode", None)) or not hasattr(vae, "use_tiling"):
        return False
    if supports_tile_parallel(vae):
        vae.enable_tiling()
        dispatch, assemble = sharing(parallel_context(group, -2, ndim=4))
        vae.tiled_decode = tiled_decode_for(vae, dispatch, assemble)
        return True
    if hasattr(vae, "clear_cache"):  # state between the calls of a tile that only its own class knows
        return False
    vae.enable_tiling()
    dealer = vae.decoder = Dealer(vae.decoder, group)
    original = vae.tiled_decode

    def tiled_decode(*args: Any, **kwargs: Any) -> Any:
        return dealer.tiled(original, *args, **kwargs)

    vae.tiled_decode = tiled_decode
    return True


@dataclass
class Made:
    """What one call of the decoder gave.

    Args:
        owner: the rank of the group that computes it.
        tile: the pixels; of another's, zeros in their shape.
        more: the call returned a tuple.
    """

    owner: int
    tile: torch.Tensor
    more: bool


class Dealer(nn.Module):
    """Stands for the decoder. The VAE's own loop runs twice: first each rank decodes its tiles, then the first rank has
    them all.

    Args:
        decoder: called once a tile, or several times with a ``conv_cache`` that belongs to the tile.
        group: tiles are dealt in turn to its ranks.
    """

    def __init__(self, decoder: nn.Module, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        self.decoder, self.group = decoder, group
        self.index, self.ranks = dist.get_rank(group), dist.get_process_group_ranks(group)
        self._step: Any = None
        self._made: list[Made] = []
        self._tile = -1

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the VAE calls."""
        return (self._step or self.decoder)(*args, **kwargs)

    def tiled(self, loop: Any, *args: Any, **kwargs: Any) -> Any:
        """The VAE's ``tiled_decode``; the picture is right on the first rank of the group.

        Sends per rank: its tiles, to the first rank.
        """
        self._made, self._tile, self._step = [], -1, self.decode_mine
        try:
            out = loop(*args, **kwargs)
            self.exchange()
            if self.index == 0:
                made = iter(self._made)
                self._step = lambda *args, **kwargs: answer(next(made))
                out = loop(*args, **kwargs)
            return out
        finally:
            self._step, self._made = None, []

    def decode_mine(self, *args: Any, **kwargs: Any) -> Any:
        """First run: decode this rank's tiles; of the others' work out the shape."""
        if kwargs.get("conv_cache") is None:
            self._tile += 1
        owner = self._tile % len(self.ranks)
        out = self.decoder(*args, **kwargs) if owner == self.index else self.shapes(*args, **kwargs)
        tile, more = (out[0], out[1:]) if isinstance(out, tuple) else (out, None)
        if owner != self.index:
            tile = torch.zeros(tile.shape, dtype=tile.dtype, device=args[0].device)
        # a copy, as blending writes into it
        self._made.append(Made(owner, tile.clone() if owner == self.index else tile, more is not None))
        return tile if more is None else (tile, *more)

    def shapes(self, *args: Any, **kwargs: Any) -> Any:
        """The decoder's result without values."""
        state = itertools.chain(self.decoder.named_parameters(), self.decoder.named_buffers())
        blank = {name: value.to("meta") for name, value in state}
        args, kwargs = tree_map_only(torch.Tensor, lambda x: x.to("meta"), (args, kwargs))
        return functional_call(self.decoder, blank, args, kwargs)

    def exchange(self) -> None:
        """All tiles to the first rank."""
        if self.index:
            mine = [m.tile.flatten() for m in self._made if m.owner == self.index]
            if mine:
                dist.send(torch.cat(mine), self.ranks[0], group=self.group)
            return
        for owner, source in enumerate(self.ranks[1:], 1):
            theirs = [m for m in self._made if m.owner == owner]
            if theirs:
                sizes = [m.tile.numel() for m in theirs]
                flat = theirs[0].tile.new_empty(sum(sizes))
                dist.recv(flat, source, group=self.group)
                for m, part in zip(theirs, torch.split(flat, sizes), strict=True):
                    m.tile = part.view(m.tile.shape)


def answer(made: Made) -> Any:
    """What the decoder gave, in its form; a cache that is not None says that the tile goes on."""
    return (made.tile, True) if made.more else made.tile
