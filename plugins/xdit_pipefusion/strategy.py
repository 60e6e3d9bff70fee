"""PipeFusion on one rank: a lazy forward, a stage of the trunk, a cache of keys and values.

Shapes: latents ``[B, C, h, w]``, rows of the trunk ``[B, n, width]``, keys and values ``[B, H, S, D]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist

from xdit_core import (
    AttentionCall,
    AttentionRun,
    Branch,
    Built,
    Channel,
    ForwardCall,
    ForwardRun,
    LazyError,
    Message,
    PatchTensor,
    PatchWorld,
    Rank,
    Receive,
    Rows,
    TrunkRun,
    length,
    positions,
    refuse_mask,
    spans_of,
)

Link = tuple[int, Channel, int]
TOKENS, TEXT = 0, 1  # parts of the messages of a patch between neighbours; in those of long skips it is the block


@dataclass
class Kept:
    """Keys and values of one attention call of one block, rows in ascending order of position; ``valid``: patches
    written."""

    k: torch.Tensor
    v: torch.Tensor
    valid: set[int] = field(default_factory=set)


class StageWorld(PatchWorld):
    """Patches live on the first stage; materializing brings them to all stages."""

    def __init__(self, rank: Rank) -> None:
        super().__init__()
        self.rank, self.group = rank, rank.group("stages")
        self.ranks = rank.mesh.ranks("stages")
        self.evaluates = rank.index("stages") == 0

    def materialize(self, tensor: PatchTensor) -> torch.Tensor:
        """The plain tensor; collective over the stages."""
        if self.evaluates:
            whole = torch.cat([tensor.patch(m) for m in range(tensor.patches)], dim=tensor.patched_dim).contiguous()
        else:
            whole = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        if self.group is not None:
            with self.rank.waiting("all stages to bring the latents together", "stages", self.group):
                self.together(dist.broadcast(whole, self.ranks[0], group=self.group, async_op=True))
        return whole

    def report(self, op: str) -> None:
        """An operation of the pipeline or its scheduler needs all rows at once."""
        super().report(op)
        self.rank.slow[op] += 1

    def together(self, work: Any) -> None:
        """Wait for a collective that only some ranks may have entered.

        Raises:
            LazyError: the others did not come within half of the run's ``timeout``.
        """
        patience = timedelta(seconds=self.rank.plan.run.patience / 2)
        try:
            work.wait(patience)
        except RuntimeError as error:
            if "timed out" not in str(error).lower() and "timeout" not in str(error).lower():
                raise  # a stage has gone, which is another story
            raise LazyError(
                "latents whose patches are still under way were read on this rank, and the other stages did not join "
                "within "
                f"{patience.total_seconds():g} s; a callback or print must read them on all ranks, or use "
                f"xdit_core.Preview."
            ) from error


class PipeFusion:
    """The wraps of one rank.

    Args:
        warmup: synchronous steps.
        rank: this rank.
    """

    def __init__(self, warmup: int, rank: Rank) -> None:
        self.warmup, self.rank, self.now = warmup, rank, rank.now
        self.stages, self.stage = rank.degree("stages"), rank.index("stages")
        self.first, self.last = self.stage == 0, self.stage == self.stages - 1
        self.ranks = rank.mesh.ranks("stages")
        # one communicator for the links behind even stages, one behind odd ones: a stage receives and sends at the same
        # time
        links = [rank.group("stages"), rank.mesh.second_group("stages")]
        self.source = Channel(rank, links[(self.stage - 1) % 2], "stages")
        self.target = Channel(rank, links[self.stage % 2], "stages")
        self.back = Channel(rank, rank.mesh.second_group("stages"), "latents", "stages")
        self.wanted, self.given, skips = self.long_skips()
        self.channels = (self.source, self.target, self.back, *skips)
        self.world = StageWorld(rank)
        self.buffers: dict[Branch, dict[tuple[int, int], Kept]] = {}
        self._ahead: Receive | None = None
        self._places: dict[Any, torch.Tensor | tuple[int, int]] = {}
        self._blank: torch.Tensor | None = None

    def built(self) -> Built:
        """For the core."""
        wraps: dict[str, Callable[..., Any]] = {
            "forward/patches": self.lazy,
            "trunk/stage": self.one_stage,
            "attention/cache": self.cached,
        }
        return Built(wraps=wraps, request=self.request)

    @contextmanager
    def request(self) -> Iterator[None]:
        """Around a call of the pipeline: no branch, no keys, no values before it or behind it."""
        with ExitStack() as stack:
            stack.callback(self.forget)
            for channel in reversed(self.channels):
                stack.enter_context(channel.request())
            yield

    def forget(self) -> None:
        """Free the buffers."""
        self.buffers.clear()
        self._places.clear()
        self._ahead = self._blank = None

    # forward

    def lazy(self, inner: ForwardRun, call: ForwardCall) -> torch.Tensor:
        """One call of the denoiser: patch after patch, each as soon as its rows are there.

        Args:
            call: latents ``[B, C, h, w]``, plain or a patch tensor.

        Returns:
            A patch tensor of the prediction; its patches arrive from the last stage. In warm-up it has one patch.
        """
        now = self.now
        for channel in self.channels:
            channel.turn()
        if now.branch.age < self.warmup or now.layout.patches == 1:
            if self.stages == 1:
                return inner(call.but(latents=self.plain(call.latents)))
            return self.run_patches(inner, call, [None], [0, call.latents.shape[now.row_dim]])
        return self.run_patches(inner, call, range(now.layout.patches), now.cuts)

    def run_patches(
        self, inner: ForwardRun, call: ForwardCall, patches: Sequence[int | None], bounds: Sequence[int]
    ) -> torch.Tensor:
        """The patches of one step through this stage."""
        cells: list[Any] = []
        try:
            for patch, (top, bottom) in zip(patches, pairwise(bounds), strict=True):
                self.now.patch = patch
                if call.elsewhere:
                    if self.first and isinstance(call.latents, PatchTensor):
                        call.latents.rows(
                            top, bottom
                        )  # so that ranks which exchange these rows reach them at the same time
                    out = inner(call)
                    cells.append(out.narrow(self.now.row_dim, top, bottom - top))
                    continue
                out = inner(call.but(latents=self.input(call.latents, top, bottom)))
                cells.append(self.output(out, top, bottom))
        finally:
            self.now.patch, self.now.placeholder = None, False
        return PatchTensor.make(
            cells,
            shape=out.shape,
            dim=self.now.row_dim,
            bounds=bounds,
            dtype=out.dtype,
            device=out.device,
            world=self.world,
        )

    def plain(self, latents: torch.Tensor) -> torch.Tensor:
        """All rows, on the rank that has them."""
        return latents.rows(0, latents.shape[self.now.row_dim]) if isinstance(latents, PatchTensor) else latents

    def input(self, latents: torch.Tensor, top: int, bottom: int) -> torch.Tensor:
        """Latents at full shape in which the rows of one patch are true; the trunk looks at no others."""
        now, dim = self.now, self.now.row_dim
        proven = now.patch is None or (now.layout, now.patch) in now.row_local
        if self.first and (bottom - top == latents.shape[dim] or (proven and not isinstance(latents, PatchTensor))):
            return self.plain(latents)
        now.placeholder = not self.first
        if self._blank is None or self._blank.shape != latents.shape or self._blank.dtype != latents.dtype:
            self._blank = torch.zeros(latents.shape, dtype=latents.dtype, device=latents.device)
        if self.first:
            if not proven:
                self._blank.fill_(torch.nan)
            rows = (
                latents.rows(top, bottom)
                if isinstance(latents, PatchTensor)
                else latents.narrow(dim, top, bottom - top)
            )
            self._blank.narrow(dim, top, bottom - top).copy_(rows)
        return self._blank

    def output(self, out: torch.Tensor, top: int, bottom: int) -> Any:
        """The future of one patch of the prediction: on the first stage, when the last stage has sent it."""
        dim = self.now.row_dim
        if self.stages == 1:
            return out.narrow(dim, top, bottom - top).contiguous()
        if self.last:
            self.back.send(out.narrow(dim, top, bottom - top), self.ranks[0], self.message())
        if not self.first:
            return None
        return self.back.receive(out, bottom - top, dim, self.ranks[-1], self.message()).wait

    def message(self, part: int = TOKENS, ahead: int = 0) -> Message:
        """The name of a message of the patch in hand, or of one that comes later."""
        patch = self.now.patch
        return Message(self.now.call, patch if patch is None else patch + ahead, part)

    # trunk

    def one_stage(self, inner: TrunkRun, rows: Rows) -> Rows | None:
        """Rows from the stage before, through the blocks of this one, to the stage behind.

        Sends ``B x n x width`` elements a patch to the next stage, and the text rows with patch 0; as many to another
        stage for each block there that takes the tokens behind a block here.
        """
        mine, segment = self.rank.blocks, self.now.segment
        if not self.first and mine.start >= segment.start:
            before = self.ranks[self.stage - 1]
            pending = self._ahead or self.source.receive(rows.tokens, rows.tokens.shape[1], 1, before, self.message())
            self._ahead = None
            tokens, text = pending.wait(), rows.text
            if (
                text is not None and text.shape[1] and mine.start > segment.start
            ):  # where a list begins, every stage has the text
                text = self.source.receive(text, text.shape[1], 1, before, self.message(TEXT)).wait()
            rows = rows.but(tokens=tokens, text=text)
            self.post_next(rows.tokens)
        if self.wanted:
            like, count = rows.tokens, rows.tokens.shape[1]
            posted = [(i, link.receive(like, count, 1, rank, self.message(i))) for i, link, rank in self.wanted]
            rows = rows.but(skips={i: receive.wait() for i, receive in posted})
        out = inner(rows)
        if self.last or out is None or mine.stop > segment.stop:
            return out
        for i, link, rank in self.given:
            link.send(out.skips[i], rank, self.message(i))
        self.target.send(out.tokens, self.ranks[self.stage + 1], self.message())
        if out.text is not None and out.text.shape[1] and mine.stop < segment.stop:
            self.target.send(out.text, self.ranks[self.stage + 1], self.message(TEXT), ".text")
        return None

    def long_skips(self) -> tuple[list[Link], list[Link], list[Channel]]:
        """What this stage wants of, and gives to, stages that are not its neighbours: block that gave the tokens,
        channel, rank."""
        spec, split, mine = self.rank.spec, self.rank.plan.split, self.rank.blocks
        if spec.long_skips is None:
            return [], [], []
        group = self.rank.mesh.second_group("stages")
        stage_of = [stage for stage, count in enumerate(split) for _ in range(count)]
        links = [Channel(self.rank, group, "skips", "stages") for _ in split]
        wanted, given = [], []
        for taker, giver in sorted(spec.long_skips(sum(split)).items()):
            if taker in mine and giver not in mine:
                wanted.append((giver, links[stage_of[giver]], self.ranks[stage_of[giver]]))
            if giver in mine and taker not in mine:
                given.append((giver, links[stage_of[taker]], self.ranks[stage_of[taker]]))
        return wanted, given, links

    def post_next(self, tokens: torch.Tensor) -> None:
        """Post the receive of the next patch of this step, so that it arrives while this one is computed."""
        now = self.now
        if now.patch is not None and now.patch + 1 < now.layout.patches:
            rows = length(now.layout.picture(now.patch + 1, now.shard))
            self._ahead = self.source.receive(tokens, rows, 1, self.ranks[self.stage - 1], self.message(ahead=1))

    # attention

    def cached(self, inner: AttentionRun, call: AttentionCall) -> Any:
        """Attend to the rows of all patches: fresh ones of this step, those of the step before where there are none
        yet.

        Args:
            call: q, k, v with the rows of the patch in hand; text rows come with patch 0.
        """
        now = self.now
        if now.layout.patches == 1:
            return inner(call)
        refuse_mask(call, "pipefusion")
        if now.patch is None:
            if now.branch.age == self.warmup - 1:  # the last synchronous step is the one that the next attends to
                self.write(self.kept(call), call)
            return inner(call)
        kept = self.kept(call)
        self.write(kept, call)
        k, v = kept.k, kept.v
        if len(kept.valid) < now.layout.patches:
            k, v = (self.only(x, kept.valid, call) for x in (k, v))
        valid = tuple(sorted(kept.valid))
        return inner(call.but(k=k, v=v, patches=valid, rows=partial(self.held, call.kind, valid)))

    def held(self, kind: str, valid: tuple[int, ...], shards: tuple[int, ...]) -> torch.Tensor:
        """Numbers of the rows that a rank with these shards attends to, in the order of its buffers."""
        if len(valid) == self.now.layout.patches:
            return positions(self.now, kind, None, shards).sort().values
        return torch.cat([positions(self.now, kind, m, shards) for m in valid])

    def kept(self, call: AttentionCall) -> Kept:
        """The buffers of this call, made on first use."""
        buffers, key = self.buffers.setdefault(self.now.branch, {}), (call.block, call.ordinal)
        if key not in buffers:
            total = sum(length(spans_of(self.now, call.kind, None, s)) for s in call.shards)
            b, h, _, d = call.k.shape
            buffers[key] = Kept(call.k.new_empty(b, h, total, d), call.v.new_empty(b, h, total, call.v.shape[-1]))
        return buffers[key]

    def write(self, kept: Kept, call: AttentionCall) -> None:
        """Put the rows of the call where they belong."""
        place = self.place(call.kind, self.now.patch, call.shards, call.k.device)
        for buffer, rows in ((kept.k, call.k), (kept.v, call.v)):
            if isinstance(place, tuple):
                buffer[:, :, place[0] : place[1]] = rows
            else:
                buffer.index_copy_(2, place, rows)
        kept.valid |= set(range(self.now.layout.patches)) if self.now.patch is None else {self.now.patch}

    def only(self, buffer: torch.Tensor, valid: set[int], call: AttentionCall) -> torch.Tensor:
        """The rows of the patches that have been written."""
        device = buffer.device
        places = [as_index(self.place(call.kind, m, call.shards, device), device) for m in sorted(valid)]
        return buffer.index_select(2, torch.cat(places))

    def place(
        self, kind: str, patch: int | None, shards: tuple[int, ...], device: torch.device
    ) -> torch.Tensor | tuple[int, int]:
        """Where rows that arrive shard after shard go in a buffer ordered by position: a range, or an index tensor."""
        key = (self.now.layout, kind, patch, shards)
        if key not in self._places:
            owned = positions(self.now, kind, None, shards)
            mine = positions(self.now, kind, patch, shards)
            index = torch.searchsorted(owned.sort().values, mine)
            start = int(index[0]) if len(index) else 0
            run = torch.equal(index, torch.arange(start, start + len(index)))
            self._places[key] = (start, start + len(index)) if run else index.to(device)
        return self._places[key]


def as_index(place: torch.Tensor | tuple[int, int], device: torch.device) -> torch.Tensor:
    """A range or index tensor as an index tensor."""
    return torch.arange(*place, device=device) if isinstance(place, tuple) else place
