"""The trunk of PipeFusion: receives rows from the stage before, runs this rank's blocks, and sends the result on.

Shapes: rows of picture or text tokens ``[B, n, width]``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from xdit_core import Channel, ForwardContext, Message, Rank, Receive, Rows, RunTrunk, length

Link = tuple[int, Channel, int]  # of a long skip: block that gives the tokens, channel, rank at the other end
TOKENS, TEXT = 0, 1  # parts of the messages between neighbours; in those of long skips the part is the block


class Stage:
    """The blocks of one rank, and its messages to and from other stages.

    Sends for each patch ``B x n x width`` elements to the next stage, with patch 0 the text rows too; and as many to
    another stage for each block there that takes the tokens behind a block here.
    """

    def __init__(self, rank: Rank) -> None:
        self.rank, self.count, self.index = rank, rank.degree("stages"), rank.index("stages")
        self.first, self.last = self.index == 0, self.index == self.count - 1
        self.ranks = rank.mesh.ranks("stages")
        # one communicator behind even stages, another behind odd ones: a stage receives and sends at the same time
        links = [rank.group("stages"), rank.mesh.second_group("stages")]
        self.source = Channel(rank, links[(self.index - 1) % 2], "stages")
        self.target = Channel(rank, links[self.index % 2], "stages")
        self.back = Channel(rank, rank.mesh.second_group("stages") if self.count % 2 else links[1], "latents", "stages")
        self.taken, self.given, skips = self.long_skips()
        self.channels = (self.source, self.target, self.back, *skips)
        self._next: Receive | None = None

    @contextmanager
    def job(self) -> Iterator[None]:
        """Surround a job: at its end, wait until every message has arrived."""
        with ExitStack() as stack:
            for channel in reversed(self.channels):
                stack.enter_context(channel.job())
            self._next = None
            yield

    def begin_call(self) -> None:
        """The pipeline calls the denoiser again."""
        for channel in self.channels:
            channel.turn()

    def message(self, context: ForwardContext, part: int = TOKENS, ahead: int = 0) -> Message:
        """The name of a message of the patch that is computed, or of one that comes later."""
        patch = context.patch
        return Message(context.number, patch if patch is None else patch + ahead, part)

    def __call__(self, inner: RunTrunk, rows: Rows) -> Rows | None:
        """One patch through the blocks of this stage; None if its rows went on to another stage."""
        mine, block_range, context = self.rank.blocks, rows.block_range, rows.context
        if not self.first and mine.start >= block_range.start:
            rows = self.receive(rows)
        if self.taken:
            like, count = rows.tokens, rows.tokens.shape[1]
            posted = [
                (block, link.receive(like, count, 1, rank, self.message(context, block)))
                for block, link, rank in self.taken
            ]
            rows = rows.but(skips={block: receive.wait() for block, receive in posted})
        out = inner(rows)
        if self.last or out is None or mine.stop > block_range.stop:
            return out
        for block, link, rank in self.given:
            link.send(out.skips[block], rank, self.message(context, block))
        behind = self.ranks[self.index + 1]
        self.target.send(out.tokens, behind, self.message(context))
        if out.text is not None and out.text.shape[1] and mine.stop < block_range.stop:
            self.target.send(out.text, behind, self.message(context, TEXT), ".text")
        return None

    def receive(self, rows: Rows) -> Rows:
        """Receive the rows that the stage before has computed, and begin to receive those of the next patch."""
        context, before, text = rows.context, self.ranks[self.index - 1], rows.text
        pending = self._next or self.source.receive(rows.tokens, rows.tokens.shape[1], 1, before, self.message(context))
        self._next, tokens = None, pending.wait()
        # where a list of blocks begins, every stage has the text
        if text is not None and text.shape[1] and self.rank.blocks.start > rows.block_range.start:
            text = self.source.receive(text, text.shape[1], 1, before, self.message(context, TEXT)).wait()
        if context.patch is not None and context.patch + 1 < context.layout.patches:
            count = length(context.layout.picture(context.patch + 1, context.shard))
            self._next = self.source.receive(tokens, count, 1, before, self.message(context, ahead=1))
        return rows.but(tokens=tokens, text=text)

    def long_skips(self) -> tuple[list[Link], list[Link], list[Channel]]:
        """Return the links from and to stages that are not neighbours, for long skips, and all their channels."""
        spec, split, mine = self.rank.spec, self.rank.plan.split, self.rank.blocks
        if spec.trunk.long_skips is None:
            return [], [], []
        group = self.rank.mesh.second_group("stages")
        stage_of = [stage for stage, count in enumerate(split) for _ in range(count)]
        links = [Channel(self.rank, group, "skips", "stages") for _ in split]
        taken, given = [], []
        for taker, giver in sorted(spec.trunk.long_skips(sum(split)).items()):
            if taker in mine and giver not in mine:
                taken.append((giver, links[stage_of[giver]], self.ranks[stage_of[giver]]))
            if giver in mine and taker not in mine:
                given.append((giver, links[stage_of[taker]], self.ranks[stage_of[taker]]))
        return taken, given, links
