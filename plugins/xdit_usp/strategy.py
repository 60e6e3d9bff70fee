"""The wraps of USP: Ulysses and Ring inside each attention call, and a gather of the tokens behind the last block.

Where all ranks have equally many rows, the communication is that of the package yunchang.

Shapes: ``B`` batch, ``H`` heads, ``S`` rows, ``D`` head dim; ``u`` marks this rank's share of rows or heads. The order
of keys does not matter to attention, so text rows need no special treatment: they are divided like all others.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from yunchang.comm.all_to_all import SeqAllToAll4D
from yunchang.ring.utils import RingComm, update_out_and_lse

from xdit_core import (
    AttentionCall,
    Built,
    ForwardContext,
    Rank,
    Rows,
    RunAttention,
    RunTrunk,
    Selector,
    gather_parts,
    length,
    refuse_mask,
)


def build(rank: Rank) -> Built:
    """Wraps for this rank; those of an axis of one rank pass through."""
    exchange, ring, gather = Ulysses(rank), Ring(rank), Gather(rank)
    return Built(wraps={"attention/exchange": exchange, "attention/ring": ring, "trunk/gather": gather})


class Ulysses:
    """Gives each rank all rows of some heads for the attention, and afterwards all heads of its own rows again.

    Sends per rank and call: ``4 x B x S/N x H x D`` elements less the share that stays (queries, keys, values, output).
    """

    def __init__(self, rank: Rank) -> None:
        self.rank, self.group = rank, rank.group("ulysses")
        self.degree, self.index = rank.degree("ulysses"), rank.index("ulysses")
        first = rank.shard - self.index
        self.shards = tuple(range(first, first + self.degree))

    def __call__(self, inner: RunAttention, call: AttentionCall) -> Any:
        """Exchange, attend, exchange back.

        Args:
            call: q, k, v ``[B, H, Su, D]``.

        Returns:
            ``[B, H, Su, D]``.
        """
        if self.group is None and self.rank.group("ring") is None:
            return inner(call)
        refuse_mask(call, "usp")
        queries, keys = call.queries.but(shards=self.shards), call.keys.but(shards=self.shards)
        if call.k.shape[1] != call.q.shape[1]:  # grouped queries: give every query head its key head
            times = call.q.shape[1] // call.k.shape[1]
            call = call.but(k=call.k.repeat_interleave(times, 1), v=call.v.repeat_interleave(times, 1))
            call.options.pop("enable_gqa", None)
        if self.group is None:
            return inner(call.but(queries=queries, keys=keys))
        rows = [len(queries.but(shards=(shard,))) for shard in self.shards]
        with self.rank.waiting("the Ulysses exchange", "ulysses", self.group):
            q, k, v = self.scatter_heads(torch.stack((call.q, call.k, call.v)), rows)
        out = inner(call.but(q=q, k=k, v=v, queries=queries, keys=keys))
        with self.rank.waiting("the Ulysses exchange", "ulysses", self.group):
            return self.gather_heads(out, rows)

    def scatter_heads(self, x: torch.Tensor, rows: list[int]) -> torch.Tensor:
        """``[3, B, H, Su, D]`` to ``[3, B, Hu, S, D]``."""
        three, b, h, s, d = x.shape
        self.count(x)
        if len(set(rows)) == 1:
            merged = x.reshape(three * b, h, s, d).transpose(1, 2)
            exchanged: torch.Tensor = SeqAllToAll4D.apply(self.group, merged, 2, 1)
            return exchanged.transpose(1, 2).view(three, b, h // self.degree, -1, d)
        send = x.view(three, b, self.degree, h // self.degree, s, d).movedim(2, 0).contiguous()
        one = three * b * (h // self.degree) * d
        received = x.new_empty(one * sum(rows))
        sizes = [one * n for n in rows]
        dist.all_to_all_single(received, send.flatten(), sizes, [one * s] * self.degree, group=self.group)
        parts = [
            p.view(three, b, h // self.degree, n, d) for p, n in zip(torch.split(received, sizes), rows, strict=True)
        ]
        return torch.cat(parts, dim=3)

    def gather_heads(self, x: torch.Tensor, rows: list[int]) -> torch.Tensor:
        """``[B, Hu, S, D]`` to ``[B, H, Su, D]``."""
        b, h, _, d = x.shape
        self.count(x)
        if len(set(rows)) == 1:
            out: torch.Tensor = SeqAllToAll4D.apply(self.group, x.transpose(1, 2), 1, 2).transpose(1, 2)
            return out
        send = torch.cat([part.flatten() for part in torch.split(x, rows, dim=2)])
        mine = rows[self.index]
        received = x.new_empty(self.degree * b * h * mine * d)
        sizes = [b * h * n * d for n in rows]
        dist.all_to_all_single(received, send, [b * h * mine * d] * self.degree, sizes, group=self.group)
        return received.view(self.degree, b, h, mine, d).movedim(0, 1).reshape(b, self.degree * h, mine, d)

    def count(self, x: torch.Tensor) -> None:
        """Count the bytes that leave this rank: all but its own share."""
        self.rank.sent["ulysses"] += x.nbytes * (self.degree - 1) // self.degree


class Ring:
    """Passes keys and values from rank to rank, and merges partial results by their log-sum-exp, in float32.

    Sends per rank and call: ``2 x B x S/N x H x D`` elements at each of ``N - 1`` hops, while the kernel works.
    """

    def __init__(self, rank: Rank) -> None:
        self.rank, self.group = rank, rank.group("ring")
        self.degree, self.index, width = rank.degree("ring"), rank.index("ring"), rank.degree("ulysses")
        self.shards = [tuple(range(r * width, (r + 1) * width)) for r in range(self.degree)]  # of each rank of the ring

    def __call__(self, inner: RunAttention, call: AttentionCall) -> Any:
        """Attend to the keys and values of all ranks of the ring.

        Args:
            call: q ``[B, H, Sq, D]``; k, v ``[B, H, Sk, D]``, this rank's share.

        Returns:
            ``[B, H, Sq, D]``.
        """
        if self.group is None:
            return inner(call)
        keys = [call.keys.but(shards=shards) for shards in self.shards]
        kv, out, lse, pending, began = torch.stack((call.k, call.v)), None, None, None, 0
        for hop in range(self.degree):
            if hop + 1 < self.degree:
                ring = RingComm(self.group)
                shape = [*kv.shape[:3], len(keys[(self.index - hop - 1) % self.degree]), kv.shape[-1]]
                pending = ring.send_recv(kv, kv.new_empty(shape))
                ring.commit()
                began = self.rank.began()
                self.rank.sent["ring"] += kv.nbytes
            source = (self.index - hop) % self.degree
            part, part_lse = inner(call.but(k=kv[0], v=kv[1], with_lse=True, keys=keys[source]))
            out, lse = update_out_and_lse(out, lse, part.transpose(1, 2), part_lse)
            if hop + 1 < self.degree and pending is not None:
                with self.rank.waiting("the ring", "ring", self.group, began=began):
                    ring.wait()
                kv = pending
        if out is None:  # a ring of no hops cannot be built
            raise RuntimeError("empty ring")
        return out.to(call.q.dtype).transpose(1, 2)


class Gather:
    """Brings the rows of all ranks together behind the last block.

    Sends per rank and step: ``B x n/N x width`` elements to each of the others, once.
    """

    def __init__(self, rank: Rank) -> None:
        self.rank, self.group = rank, rank.mesh.joint_group(("ring", "ulysses"))
        self.shards, self.select = rank.plan.shards, Selector()

    def __call__(self, inner: RunTrunk, rows: Rows) -> Rows | None:
        """This rank's rows in, the rows of the whole patch out; None where the blocks gave none."""
        out = inner(rows)
        if out is None or self.group is None:
            return out
        context, x = rows.context, out.tokens
        counts = [length(context.layout.picture(context.patch, shard)) for shard in range(self.shards)]
        with self.rank.waiting("the rows of the other ranks", "gather", self.group):
            parts, _ = gather_parts(x, counts, 1, self.group)
        self.rank.sent["gather"] += x.nbytes * (self.shards - 1)
        whole = self.in_order(context, parts)
        return out.but(tokens=whole)

    def in_order(self, context: ForwardContext, parts: list[torch.Tensor]) -> torch.Tensor:
        """Sort rows that are ordered by shard into the order of the picture."""
        layout = context.layout
        if context.patch is not None or layout.patches == 1:
            return torch.cat(parts, dim=1)
        # at full sequence a shard owns a part of every patch
        whole = parts[0].new_empty(parts[0].shape[0], layout.tokens, parts[0].shape[2])
        for s, part in enumerate(parts):
            whole.index_copy_(1, self.select.index(layout.picture(None, s), whole.device), part)
        return whole
