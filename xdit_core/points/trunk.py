"""The trunk: the stack of blocks as one module, working on the rows that this rank has in hand.

The denoiser's own ``forward`` goes on doing the embedding, the conditioning and the head, at full shape. Rows are
selected and put back here, and only here. Shapes: ``[B, n, D]`` - batch, rows, width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from xdit_core.errors import ModelError, UnsupportedCall
from xdit_core.model_spec import Aligned, ModelSpec, Stream
from xdit_core.observe.observer import Observer
from xdit_core.observe.weaving import watched
from xdit_core.parallel.tokens import Span, length
from xdit_core.points.adapter_check import attention_kinds, check_made, check_returned
from xdit_core.points.attention import AttentionPoint
from xdit_core.points.blocks.empty_text import EmptyText
from xdit_core.points.blocks.routing import EmptyRows, Routing
from xdit_core.points.compose import compose
from xdit_core.points.context import ForwardContext, Running


@dataclass(frozen=True, slots=True)
class Rows:
    """The tokens on their way through the trunk, which its wraps get and return.

    Args:
        tokens: picture rows ``[B, n, D]``.
        text: text rows ``[B, t, D]`` (t may be 0), None if the model has no text in its trunk or is done with it.
        rest: the other arguments of a block.
        context: of the call of the denoiser.
        block_range: indices of all blocks that this trunk stands for, on all stages.
        skips: tokens that earlier blocks returned and later blocks take again, by the index of the earlier block.
    """

    tokens: torch.Tensor
    text: torch.Tensor | None
    rest: Mapping[str, Any]
    context: ForwardContext
    block_range: range
    skips: Mapping[int, torch.Tensor] = field(default_factory=dict)

    def but(self, **changes: Any) -> Rows:
        """A copy with other values."""
        return replace(self, **changes)


RunTrunk = Callable[[Rows], Rows | None]


class NothingHere(Exception):
    """Raised to leave the denoiser's forward behind the trunk, when this rank holds no rows for the head."""


class Selector:
    """Takes rows out of a tensor by spans and puts them back. Index tensors are made once for each set of spans."""

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

    def put(
        self, like: torch.Tensor, rows: torch.Tensor, spans: tuple[Span, ...], dim: int, fresh: bool = False
    ) -> torch.Tensor:
        """A tensor of the shape of ``like`` with ``rows`` at spans; elsewhere is what was put there before, or zeros.

        Args:
            fresh: write into ``like`` itself.
        """
        if spans == ((0, like.shape[dim]),):
            return rows
        full = like if fresh else self._full
        if full is None or (full.shape, full.dtype, full.device) != (like.shape, like.dtype, like.device):
            full = self._full = torch.zeros_like(like)
        if len(spans) == 1:
            full.narrow(dim, spans[0][0], length(spans)).copy_(rows)
            return full
        return full.index_copy_(dim, self.index(spans, like.device), rows)


class Trunk(nn.Module):
    """Stands where the denoiser had its block list, or one of several.

    Args:
        blocks: the blocks that this rank holds, by global index.
        block_range: indices of all blocks that stood there.
        spec: how they are called.
        stream: how these are called.
        running: holds the context of the call of the denoiser.
        point: the attention point.
        chain: wraps ``f(inner, rows) -> rows or None``, outermost first. None means that this rank holds nothing of the
            result.
        skips: of all blocks, which take the tokens behind which earlier one.
        names: of the arguments of a block.
        later: this rank holds blocks of a later list.
    """

    def __init__(
        self,
        blocks: Mapping[int, nn.Module],
        block_range: range,
        spec: ModelSpec,
        stream: Stream,
        running: Running,
        point: AttentionPoint,
        chain: Sequence[Callable[[RunTrunk, Rows], Rows | None]],
        skips: Mapping[int, int],
        names: tuple[str, ...],
        later: bool = False,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({str(i): block for i, block in blocks.items()})
        self._order: tuple[tuple[int, Callable[..., Any], tuple[str, ...]], ...]
        self._order = tuple((i, block, attention_kinds(spec, block)) for i, block in blocks.items())
        self._spec, self._unproven = spec, set(blocks)  # blocks whose result has not been looked at yet
        self.stream, self._block_range, self._skips, self._wanted = (
            stream,
            block_range,
            skips,
            frozenset(skips.values()),
        )
        self._running, self._point = running, point
        self.select = Selector()
        self._routing = Routing(point)
        self._empty_rows: EmptyRows | None = EmptyRows()  # until it is known that the blocks do without
        self._empty_text = EmptyText()
        self._names, self._later = names, later
        self._run: RunTrunk = compose(chain, self.run_blocks)

    def watch(self, observer: Observer) -> None:
        """Let an observer see the blocks that it wants to see."""
        self._order = tuple((i, watched(block, observer.block(i)), pattern) for i, block, pattern in self._order)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Called by the denoiser as if it were one block, at full shape; returns what a block returns."""
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        stream, context = self.stream, self._running.context
        layout = context.layout
        if context.shape_only:
            return self.as_returned(given[stream.tokens], given.get(stream.text))
        tokens = whole = given.pop(stream.tokens)
        text = given.pop(stream.text) if stream.text else None
        if stream.joined:
            tokens, text = whole[:, : layout.tokens], whole[:, layout.tokens :]
            if text.shape[1] != layout.text:  # a part of the batch may have shorter texts than the whole
                layout = replace(layout, text=text.shape[1])
                context = context.but(layout=layout)
        if tokens.shape[1] != layout.tokens or (text is not None and text.shape[1] != layout.text):
            raise ModelError(
                f"the trunk got {tokens.shape[1]} picture rows and {0 if text is None else text.shape[1]} text rows "
                f"where {layout.tokens} and {layout.text} were expected; the adapter does not describe this checkpoint."
            )
        if not self._order:  # this rank has its blocks in other lists
            if context.shape_known and not self._later:
                raise NothingHere
            return self.as_returned(whole, text)
        patch, shard = context.patch, context.shard
        picture, words = layout.picture(patch, shard), layout.words(patch, shard)
        self.cut(given, stream.image_aligned, picture)
        self.cut(given, stream.text_aligned, words)
        self.cut(given, stream.joint_aligned, layout.joint(patch, shard))
        if stream.frames:
            given[stream.frames] = context.frames
        mine = Rows(
            self.select.take(tokens, picture, 1),
            None if text is None else self.select.take(text, words, 1),
            given,
            context,
            self._block_range,
        )
        if context.check_embedding and mine.tokens.isnan().any():
            raise UnsupportedCall(
                "the embedding of the latents mixes rows of the picture, so its patches cannot be computed one by one; "
                "run this model without strategies that cut the picture into patches."
            )
        out = self._run(mine)
        if out is None and context.shape_known:
            raise NothingHere
        full = tokens if out is None else self.put_back(tokens, out.tokens, context)
        if stream.joined and text is not None:
            return torch.cat((full, text), dim=1)
        return self.as_returned(full, text)

    def as_returned(self, tokens: torch.Tensor, text: torch.Tensor | None) -> Any:
        """What a block returns, in its order."""
        values = [tokens if name == "tokens" else text for name in self.stream.returns]
        return tuple(values) if len(values) > 1 else values[0]

    def put_back(self, like: torch.Tensor, rows: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """Rows at full shape for the head, which looks at those of the patch only.

        Args:
            like: of the full shape.
            rows: of the patch, of all shards.
        """
        check, spans = context.check_head, context.layout.picture(context.patch, None)
        if check is None:
            return self.select.put(like, rows, spans, 1)
        # what lies beside the patch has no numbers until it is known that the head does not look at it
        check.given_nan = not bool(rows.isnan().any())
        return self.select.put(
            torch.full_like(like, torch.nan) if check.given_nan else like, rows, spans, 1, fresh=check.given_nan
        )

    def cut(self, given: dict[str, Any], arguments: tuple[Aligned, ...], spans: tuple[Span, ...]) -> None:
        """Take the rows in spans of some arguments, in place."""
        for aligned in arguments:
            value = given.get(aligned.argument)
            if value is None:
                continue

            def take(x: torch.Tensor, of: Aligned = aligned) -> torch.Tensor:
                return self.select.take(x, spans, of.dim) if of.dims is None or x.dim() == of.dims else x

            if aligned.item is not None:
                given[aligned.argument] = tuple(take(x) if i == aligned.item else x for i, x in enumerate(value))
            else:
                given[aligned.argument] = tree_map_only(torch.Tensor, take, value)

    def run_blocks(self, rows: Rows) -> Rows:
        """The blocks of this rank, one after the other, on the rows in hand."""
        stream, point, skip = self.stream, self._point, rows.context.skipped_blocks
        point.enter_blocks(rows.context, rows.tokens.shape, None if rows.text is None else rows.text.shape[1])
        no_text = rows.text is not None and not rows.text.shape[1]
        empty = self._empty_rows if no_text else None
        shortened = no_text and bool(stream.text) and point.active and not self._compiled()
        with self._routing if point.active else nullcontext(), empty or nullcontext():
            for index, block, pattern in self._order:
                if index in skip:
                    continue
                arguments = {**rows.rest, stream.tokens: rows.tokens}
                if stream.text:
                    arguments[stream.text] = rows.text
                elif stream.joined and rows.text is not None:
                    arguments[stream.tokens] = torch.cat((rows.tokens, rows.text), dim=1)
                if index in self._skips:
                    arguments[stream.skip] = rows.skips[self._skips[index]]
                point.enter_block(index, pattern)
                if shortened and rows.text is not None:
                    one = self.blocks[str(index)]
                    with self._empty_text.left_out((index, rows.text.shape), one, arguments):
                        out = block(**arguments)
                else:
                    out = block(**arguments)
                if point.active:
                    point.leave_block()
                returned = out if isinstance(out, tuple) else (out,)
                if index in self._unproven and not torch.compiler.is_compiling():
                    given: torch.Tensor = arguments[stream.tokens]
                    check_returned(self._spec, stream, self.blocks[str(index)], returned, given)
                    self._unproven.discard(index)
                if stream.joined and rows.text is not None:
                    n = rows.tokens.shape[1]
                    rows = rows.but(tokens=out[:, :n], text=out[:, n:])
                    continue
                parts = dict(zip(stream.returns, returned, strict=True))
                rows = rows.but(tokens=parts["tokens"], text=parts.get("text", rows.text))
                if index in self._wanted:
                    rows = rows.but(skips={**rows.skips, index: rows.tokens})
        if empty is not None and not empty.met and not skip and not self._compiled():
            self._empty_rows = None
        return rows

    def _compiled(self) -> bool:
        """The blocks are compiled, one by one or with the whole denoiser."""
        return torch.compiler.is_compiling() or any(b._compiled_call_impl is not None for b in self.blocks.values())


def replace_blocks(
    denoiser: nn.Module,
    spec: ModelSpec,
    running: Running,
    point: AttentionPoint,
    chain: Sequence[Callable[[RunTrunk, Rows], Rows | None]],
) -> list[Trunk]:
    """Put a trunk where the denoiser has its block lists, one for each stream; placeholders of absent blocks are left
    out."""
    trunks: list[Trunk] = []
    lists = [list(getattr(denoiser, part.attribute)) for part in spec.trunk.blocks]
    everything = [block for blocks in lists for block in blocks]
    last = max(i for i, block in enumerate(everything) if not isinstance(block, Absent))
    skips, start = (spec.trunk.long_skips(len(everything)) if spec.trunk.long_skips else {}), 0
    for stream, group in groupby(spec.trunk.blocks, spec.trunk.stream_of):
        parts, begin, held = list(group), start, {}
        for part in parts:
            rows = zip(*(getattr(denoiser, name) for name in (part.attribute, *part.beside)), strict=True)
            for i, blocks in enumerate(rows):
                if isinstance(blocks[0], Absent):
                    continue
                held[start + i] = blocks[0]
                if part.make:
                    held[start + i] = part.make(denoiser, i, *blocks)
                    check_made(spec, part, held[start + i])
            start += len(getattr(denoiser, part.attribute))
        names = arguments_of(everything[begin])
        trunk = Trunk(held, range(begin, start), spec, stream, running, point, chain, skips, names, last >= start)
        for k, part in enumerate(parts):
            setattr(denoiser, part.attribute, nn.ModuleList([trunk] if k == 0 else []))
            for name in part.beside:
                setattr(denoiser, name, nn.ModuleList([nn.Identity()]))  # as many as there are trunks, never called
        trunks.append(trunk)
    keep_parts(everything[0], trunks[0], spec.trunk.shared_submodules)
    return trunks


def arguments_of(block: nn.Module) -> tuple[str, ...]:
    """Names of the arguments of a block's forward."""
    return block.arguments if isinstance(block, Absent) else tuple(inspect.signature(block.forward).parameters)


def keep_parts(block: nn.Module, into: nn.Module, names: Sequence[str]) -> None:
    """Make some submodules of a block reachable under the same names from another module."""
    for name in names:
        *parents, last = name.split(".")
        holder = into
        for parent in parents:
            if not hasattr(holder, parent):
                holder.add_module(parent, nn.Module())
            holder = getattr(holder, parent)
        holder.add_module(last, block.get_submodule(name))


class Absent(nn.Module):
    """A placeholder for a block that another stage holds.

    Attributes:
        names: names of the submodules of the block.
        arguments: names of the arguments of its forward.
    """

    def __init__(self, block: nn.Module, kept: Sequence[str] = ()) -> None:
        super().__init__()
        self.names = tuple(name for name, _ in block.named_modules())
        self.arguments = tuple(inspect.signature(block.forward).parameters)
        keep_parts(block, self, kept)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Never called."""
        raise UnsupportedCall("this rank does not hold this block")
