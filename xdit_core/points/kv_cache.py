"""Keys and values of the whole picture, of which a patch is renewed at a time."""

from __future__ import annotations

from itertools import accumulate

import torch

from xdit_core.points.attention import AttentionCall


class KVCache:
    """Keys and values of one attention call of one block, patch after patch.

    Patches are written in their order; what was never written is not attended to.

    Args:
        call: the first one; says which rows the cache will have, in which shape and precision.
    """

    def __init__(self, call: AttentionCall) -> None:
        self.rows = call.keys.but(patches=tuple(range(call.context.layout.patches)))
        sizes = [len(self.rows.but(patches=(patch,))) for patch in self.rows.patches]
        self._bounds = tuple(accumulate(sizes, initial=0))
        batch, heads, _, width = call.k.shape
        self.k = call.k.new_empty(batch, heads, self._bounds[-1], width)
        self.v = call.v.new_empty(batch, heads, self._bounds[-1], call.v.shape[-1])
        self.written = 0  # patches

    def write(self, call: AttentionCall) -> None:
        """Put the keys and values of a patch, or of the whole picture, where they belong."""
        patch = call.context.patch
        if patch is None:
            index = self.rows.index_in(call.keys).to(call.k.device)
            torch.index_select(call.k, 2, index, out=self.k)
            torch.index_select(call.v, 2, index, out=self.v)
            self.written = len(self.rows.patches)
            return
        start, stop = self._bounds[patch], self._bounds[patch + 1]
        self.k[:, :, start:stop] = call.k
        self.v[:, :, start:stop] = call.v
        self.written = max(self.written, patch + 1)

    def attend(self, call: AttentionCall) -> AttentionCall:
        """The call with the keys and values of all patches that have been written."""
        stop = self._bounds[self.written]
        rows = (
            self.rows
            if self.written == len(self.rows.patches)
            else self.rows.but(patches=self.rows.patches[: self.written])
        )
        return call.but(k=self.k[:, :, :stop], v=self.v[:, :, :stop], keys=rows)
