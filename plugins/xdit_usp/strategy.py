"""The wraps of USP: Ulysses and Ring inside each attention call, and a gather of the tokens behind the last block.

Ulysses: arXiv:2309.14509. Ring: arXiv:2310.01889. Both together: arXiv:2405.07719, whose package yunchang is what the
tests compare with.

Shapes: ``B`` batch, ``H`` heads, ``S`` rows, ``D`` head dim; ``u`` marks this rank's share of rows or heads. The order
of keys does not matter to attention, so text rows need no special treatment: they are divided like all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

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
        rows = queries.by_shard
        with self.rank.waiting("the Ulysses exchange", "ulysses", self.group):
            q, k, v = self.scatter_heads((call.q, call.k, call.v), rows)
        out = inner(call.but(q=q, k=k, v=v, queries=queries, keys=keys))
        with self.rank.waiting("the Ulysses exchange", "ulysses", self.group):
            return self.gather_heads(out, rows)

    def scatter_heads(self, parts: Sequence[torch.Tensor], rows: Sequence[int]) -> tuple[torch.Tensor, ...]:
        """Tensors ``[B, H, Su, D]`` to as many ``[B, Hu, S, D]``: one copy, one message, and views of what came.

        Rows come first in the message, so those of all ranks lie one behind the other.
        """
        b, h, s, d = parts[0].shape
        heads, n = h // self.degree, len(parts)
        send = torch.stack([x.view(b, self.degree, heads, s, d).permute(1, 3, 0, 2, 4) for x in parts], dim=2)
        one = n * b * heads * d
        received = send.new_empty(sum(rows), n, b, heads, d)
        self.exchange(received, send, [one * count for count in rows], [one * s] * self.degree)
        return received.permute(1, 2, 3, 0, 4).unbind()

    def gather_heads(self, x: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """``[B, Hu, S, D]`` to ``[B, H, Su, D]``, which lies in memory as ``[B, Su, H, D]``."""
        b, heads, _, d = x.shape
        mine, one = rows[self.index], b * heads * d
        send = x.permute(2, 0, 1, 3).contiguous()
        received = send.new_empty(self.degree, mine, b, heads, d)
        self.exchange(received, send, [one * mine] * self.degree, [one * count for count in rows])
        return received.permute(2, 1, 0, 3, 4).flatten(2, 3).transpose(1, 2)

    def exchange(self, received: torch.Tensor, send: torch.Tensor, coming: list[int], going: list[int]) -> None:
        """One all-to-all; sizes in elements, by rank."""
        self.rank.sent["ulysses"] += send.nbytes * (self.degree - 1) // self.degree
        dist.all_to_all_single(received.view(-1), send.view(-1), coming, going, group=self.group)


class Ring:
    """Passes keys and values from rank to rank, and merges partial results by their log-sum-exp, in float32.

    Sends per rank and call: ``2 x B x S/N x H x D`` elements at each of ``N - 1`` hops, while the kernel works.
    """

    def __init__(self, rank: Rank) -> None:
        self.rank, self.group = rank, rank.group("ring")
        self.degree, self.index, width = rank.degree("ring"), rank.index("ring"), rank.degree("ulysses")
        self.shards = [tuple(range(r * width, (r + 1) * width)) for r in range(self.degree)]  # of each rank of the ring
        if self.group is not None:
            ranks = dist.get_process_group_ranks(self.group)
            self._next, self._before = ranks[(self.index + 1) % self.degree], ranks[self.index - 1]

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
        kv, coming, merged, began = torch.stack((call.k, call.v)), None, None, 0
        for hop in range(self.degree):
            if hop + 1 < self.degree:
                coming = kv.new_empty(*kv.shape[:3], len(keys[(self.index - hop - 1) % self.degree]), kv.shape[-1])
                pending = self.pass_on(kv, coming)
                began = self.rank.began()
            source = (self.index - hop) % self.degree
            part = inner(call.but(k=kv[0], v=kv[1], with_lse=True, keys=keys[source]))
            merged = Merged(*part) if merged is None else merged.add(*part)
            if coming is not None and hop + 1 < self.degree:
                with self.rank.waiting("the ring", "ring", self.group, began=began):
                    for work in pending:
                        work.wait()
                kv = coming
        if merged is None:  # a ring of no hops cannot be built
            raise RuntimeError("empty ring")
        return merged.out.to(call.q.dtype)

    def pass_on(self, kv: torch.Tensor, coming: torch.Tensor) -> list[Any]:
        """Begin a hop: send to the next rank, receive from the one before."""
        self.rank.sent["ring"] += kv.nbytes
        following = dist.P2POp(dist.isend, kv, self._next, self.group)
        return dist.batch_isend_irecv([following, dist.P2POp(dist.irecv, coming, self._before, self.group)])


class Merged:
    """Attention over several sets of keys, in float32.

    The parts are weighted by their log-sum-exp (Ring Attention, arXiv:2310.01889; FlashAttention-2, section 3.1).

    Args:
        out: ``[B, H, S, D]``.
        lse: natural, ``[B, H, S]``.
    """

    def __init__(self, out: torch.Tensor, lse: torch.Tensor) -> None:
        self.out, self.lse = out.float(), lse.float()

    def add(self, out: torch.Tensor, lse: torch.Tensor) -> Merged:
        """With the part of further keys."""
        both = torch.logaddexp(self.lse, lse)
        self.out = torch.lerp(self.out, out.float(), (lse - both).exp_().unsqueeze(-1))
        self.lse = both
        return self


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
