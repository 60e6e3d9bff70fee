"""Hooks on the blocks, for observers that want to see the rows between them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from xdit_core.model_spec import Stream
from xdit_core.parallel.rank import Rank
from xdit_core.parallel.tokens import length
from xdit_core.points.trunk import Trunk


def watch_rows(rank: Rank, trunks: Sequence[Trunk], denoisers: Iterable[Any]) -> None:
    """Tell the observer of a rank of all rows before the first and behind every block.

    Args:
        trunks: where the blocks are, if strategies wrapped them.
        denoisers: of the pipeline.
    """
    listener = Listener(rank)
    for index, block, stream in blocks_of(rank, trunks, denoisers):
        block.register_forward_hook(partial(listener.behind, index, stream))
        if index == 0:
            names = tuple(inspect.signature(block.forward).parameters)
            block.register_forward_pre_hook(partial(listener.before, names, stream), with_kwargs=True)


class Listener:
    """The hooks on the blocks of one rank."""

    def __init__(self, rank: Rank) -> None:
        self._observer, self._running = rank.observer, rank.running

    def before(self, names: tuple[str, ...], stream: Stream, block: Any, args: Any, kwargs: Any) -> None:
        """Tell of the rows that the first block gets."""
        self.tell(0, stream, {**dict(zip(names, args, strict=False)), **kwargs}[stream.tokens])

    def behind(self, index: int, stream: Stream, block: Any, args: Any, out: Any) -> None:
        """Tell of the rows that a block returned."""
        parts = dict(zip(stream.returns, out if isinstance(out, tuple) else (out,), strict=False))
        self.tell(index + 1, stream, parts["tokens"])

    def tell(self, place: int, stream: Stream, rows: torch.Tensor) -> None:
        """Tell of rows ``[B, n, D]``, without those of the text."""
        context = self._running.context
        count = length(context.layout.picture(context.patch, context.shard))
        if stream.joined:
            rows = rows[:, :count]
        if rows.shape[1] == count:  # else text and picture are in one, and the adapter takes them apart later
            self._observer.rows(place, rows, context)


def blocks_of(
    rank: Rank, trunks: Sequence[Trunk], denoisers: Iterable[Any]
) -> Iterator[tuple[int, torch.nn.Module, Stream]]:
    """The global index of each block that this rank holds, the block, and how it is called."""
    spec = rank.spec
    for trunk in trunks:
        yield from ((int(name), block, trunk.stream) for name, block in trunk.blocks.items())
    for denoiser in () if trunks else denoisers:
        index = 0
        for part in spec.trunk.blocks:
            for block in getattr(denoiser, part.attribute):
                if part.make is None:  # else the denoiser has no such module
                    yield index, block, spec.trunk.stream_of(part)
                index += 1
