"""The trunk: the stack of blocks as one module, working on the rows that this rank has in hand.

The denoiser's own ``forward`` goes on doing the embedding, the conditioning and the head, at full shape. Rows are
selected and put back here, and only here. Shapes: ``[B, n, D]`` - batch, rows, width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from xdit_core.attention import AttentionPoint, Redirect
from xdit_core.chain import nest
from xdit_core.errors import ModelError, UnsupportedCall
from xdit_core.rank import Now
from xdit_core.records import ModelSpec, Stream
from xdit_core.tokens import Span, length


@dataclass(frozen=True, slots=True)
class Rows:
    """What flows through the trunk.

    Args:
        tokens: picture rows ``[B, n, D]``.
        text: text rows ``[B, t, D]`` (t may be 0), None if the model has no text in its trunk or is done with it.
        rest: the other arguments of a block.
    """

    tokens: torch.Tensor
    text: torch.Tensor | None
    rest: Mapping[str, Any]

    def but(self, **changes: Any) -> Rows:
        """A copy with other values."""
        return replace(self, **changes)


Run = Callable[[Rows], Rows | None]


class NothingHere(Exception):
    """Leaves the denoiser's forward behind the trunk: this rank holds nothing for the head to work on."""


class Selector:
    """Takes and puts back rows by spans; index tensors are made once for each set of spans."""

    def __init__(self) -> None:
        self._indices: dict[tuple[tuple[Span, ...], torch.device], torch.Tensor] = {}
        self._full: torch.Tensor | None = None

    def index(self, spans: tuple[Span, ...], device: torch.device) -> torch.Tensor:
        """The rows of spans as an int64 tensor."""
        key = (spans, device)
        if key not in self._indices:
            parts = [torch.arange(a, b, device=device) for a, b in spans]
            self._indices[key] = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=device)
        return self._indices[key]

    def take(self, x: torch.Tensor, spans: tuple[Span, ...], dim: int) -> torch.Tensor:
        """The rows of ``x`` in spans; a view where they are one range."""
        if spans == ((0, x.shape[dim]),):
            return x
        if len(spans) <= 1:
            start, stop = spans[0] if spans else (0, 0)
            return x.narrow(dim, start, stop - start)
        return x.index_select(dim, self.index(spans, x.device))

    def put(self, like: torch.Tensor, rows: torch.Tensor, spans: tuple[Span, ...], dim: int) -> torch.Tensor:
        """A tensor of the shape of ``like`` with ``rows`` at spans; elsewhere is what was put there before, or zeros."""
        if spans == ((0, like.shape[dim]),):
            return rows
        full = self._full
        if full is None or (full.shape, full.dtype, full.device) != (like.shape, like.dtype, like.device):
            full = self._full = torch.zeros_like(like)
        if len(spans) == 1:
            full.narrow(dim, spans[0][0], length(spans)).copy_(rows)
            return full
        return full.index_copy_(dim, self.index(spans, like.device), rows)


class Trunk(nn.Module):
    """Stands where the denoiser had its block list.

    Args:
        blocks: the blocks that this rank holds, by global index.
        spec: how they are called.
        now: the work in hand.
        point: the attention point.
        chain: wraps ``f(inner, rows) -> rows or None``, outermost first. None means that this rank holds nothing of the result.
    """

    def __init__(
        self,
        blocks: Mapping[int, nn.Module],
        spec: ModelSpec,
        now: Now,
        point: AttentionPoint,
        chain: Sequence[Callable[[Run, Rows], Rows | None]],
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({str(i): block for i, block in blocks.items()})
        self._order = tuple((i, block, spec.attention(block)) for i, block in blocks.items())
        self._stream: Stream = spec.stream
        self._now, self._point = now, point
        self.select = Selector()
        self._redirect = Redirect(point)
        self._names = tuple(inspect.signature(next(iter(blocks.values())).forward).parameters)
        self._run: Run = nest(chain, self.run_blocks)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Called by the denoiser as if it were one block, at full shape; returns what a block returns."""
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        stream, layout, now = self._stream, self._now.layout, self._now
        tokens = given.pop(stream.tokens)
        text = given.pop(stream.text) if stream.text else None
        if tokens.shape[1] != layout.tokens or (text is not None and text.shape[1] != layout.text):
            raise ModelError(
                f"the trunk got {tokens.shape[1]} picture rows and {0 if text is None else text.shape[1]} text rows where "
                f"{layout.tokens} and {layout.text} were expected; the adapter does not describe this checkpoint."
            )
        picture = layout.picture(now.patch, now.shard)
        for name, dim in stream.aligned.items():
            if given.get(name) is not None:
                given[name] = self.select.take(given[name], picture, dim)
        for name, dim in stream.joint.items():
            spans = layout.joint(now.patch, now.shard)
            given[name] = tree_map_only(torch.Tensor, partial(self.select.take, spans=spans, dim=dim), given.get(name))
        mine = Rows(
            self.select.take(tokens, picture, 1),
            None if text is None else self.select.take(text, layout.words(now.patch, now.shard), 1),
            given,
        )
        out = self._run(mine)
        if out is None and self._now.known:
            raise NothingHere
        full = tokens if out is None else self.select.put(tokens, out.tokens, layout.picture(now.patch, None), 1)
        answer = [full if name == "tokens" else text for name in stream.returns]
        return tuple(answer) if len(answer) > 1 else answer[0]

    def run_blocks(self, rows: Rows) -> Rows:
        """The blocks of this rank, one after the other, on the rows in hand."""
        stream, point, skip = self._stream, self._point, self._now.skip
        with self._redirect if point.active else nullcontext():
            for index, block, pattern in self._order:
                if index in skip:
                    continue
                arguments = {**rows.rest, stream.tokens: rows.tokens}
                if stream.text:
                    arguments[stream.text] = rows.text
                point.enter_block(index, pattern)
                out = block(**arguments)
                if point.active:
                    point.leave_block()
                parts = dict(zip(stream.returns, out if isinstance(out, tuple) else (out,), strict=False))
                rows = rows.but(tokens=parts["tokens"], text=parts.get("text", rows.text))
        return rows


def replace_blocks(denoiser: nn.Module, spec: ModelSpec, make: Callable[[Mapping[int, nn.Module]], Trunk]) -> Trunk:
    """Put a trunk where the denoiser has its block lists; placeholders of absent blocks are left out."""
    everything: list[nn.Module] = []
    for part in spec.blocks:
        everything += list(getattr(denoiser, part.attribute))
    trunk = make({i: block for i, block in enumerate(everything) if not isinstance(block, Absent)})
    for k, part in enumerate(spec.blocks):
        setattr(denoiser, part.attribute, nn.ModuleList([trunk] if k == 0 else []))
    return trunk


class Absent(nn.Module):
    """Stands for a block that another stage holds.

    Attributes:
        names: of the submodules that the block has.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.names = tuple(name for name, _ in block.named_modules())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Never called."""
        raise UnsupportedCall("this rank does not hold this block")
