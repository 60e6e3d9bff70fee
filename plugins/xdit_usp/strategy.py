"""The communication of USP, on yunchang's pieces where the shares are even.

Shapes: ``B`` batch, ``H`` heads, ``S`` rows, ``D`` head dim; ``u`` marks this rank's share of rows or heads. The order
of keys does not matter to attention, so text rows need no special treatment: they are divided like all others.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from yunchang.comm.all_to_all import SeqAllToAll4D
from yunchang.ring.utils import RingComm, update_out_and_lse

from xdit_core import AttentionCall, AttentionRun, Built, Rank, Rows, Selector, TrunkRun, length, refuse_mask, spans_of


def build(rank: Rank) -> Built:
    """Wraps for this rank; those of an axis of one rank pass through."""
    exchange, ring, gather = Ulysses(rank), Ring(rank), Gather(rank)
    return Built(wraps={"attention/exchange": exchange, "attention/ring": ring, "trunk/gather": gather})


class Ulysses:
    """Rows of all ranks and a share of the heads inside, a share of the rows and all heads outside.

    Sends per rank and call: ``4 x B x S/N x H x D`` elements less the share that stays (queries, keys, values, output).
    """

    def __init__(self, rank: Rank) -> None:
        self.rank, self.now = rank, rank.now
        self.group, self.degree, self.index = rank.group("ulysses"), rank.degree("ulysses"), rank.index("ulysses")

    def __call__(self, inner: AttentionRun, call: AttentionCall) -> Any:
        """Exchange, attend, exchange back.

        Args:
            call: q, k, v ``[B, H, Su, D]``.

        Returns:
            ``[B, H, Su, D]``.
        """
        if self.group is None and self.rank.group("ring") is None:
            return inner(call)
        refuse_mask(call, "usp")
        first = self.now.shard - self.index
        shards = tuple(range(first, first + self.degree))
        if call.k.shape[1] != call.q.shape[1]:  # grouped queries: give every query head its key head
            times = call.q.shape[1] // call.k.shape[1]
            call = call.but(k=call.k.repeat_interleave(times, 1), v=call.v.repeat_interleave(times, 1))
            call.options.pop("enable_gqa", None)
        if self.group is None:
            return inner(call.but(shards=shards))
        rows = [length(spans_of(self.now, call.kind, self.now.patch, s)) for s in shards]
        with self.rank.waiting("the Ulysses exchange", "ulysses", self.group):
            q, k, v = self.scatter_heads(torch.stack((call.q, call.k, call.v)), rows)
        out = inner(call.but(q=q, k=k, v=v, shards=shards))
        with self.rank.waiting("the Ulysses exchange", "ulysses", self.group):
            return self.gather_heads(out, rows)

    def scatter_heads(self, x: torch.Tensor, rows: list[int]) -> torch.Tensor:
        """``[3, B, H, Su, D]`` to ``[3, B, Hu, S, D]``."""
        three, b, h, s, d = x.shape
        self.count(x)
        if len(set(rows)) == 1:
            merged = x.reshape(three * b, h, s, d).transpose(1, 2)
            return SeqAllToAll4D.apply(self.group, merged, 2, 1).transpose(1, 2).view(three, b, h // self.degree, -1, d)
        send = x.view(three, b, self.degree, h // self.degree, s, d).movedim(2, 0).contiguous()
        one = three * b * (h // self.degree) * d
        received = x.new_empty(one * sum(rows))
        sizes = [one * n for n in rows]
        dist.all_to_all_single(received, send.flatten(), sizes, [one * s] * self.degree, group=self.group)
        parts = [p.view(three, b, h // self.degree, n, d) for p, n in zip(received.split(sizes), rows, strict=True)]
        return torch.cat(parts, dim=3)

    def gather_heads(self, x: torch.Tensor, rows: list[int]) -> torch.Tensor:
        """``[B, Hu, S, D]`` to ``[B, H, Su, D]``."""
        b, h, _, d = x.shape
        self.count(x)
        if len(set(rows)) == 1:
            out: torch.Tensor = SeqAllToAll4D.apply(self.group, x.transpose(1, 2), 1, 2).transpose(1, 2)
            return out
        send = torch.cat([part.flatten() for part in x.split(rows, dim=2)])
        mine = rows[self.index]
        received = x.new_empty(self.degree * b * h * mine * d)
        sizes = [b * h * n * d for n in rows]
        dist.all_to_all_single(received, send, [b * h * mine * d] * self.degree, sizes, group=self.group)
        return received.view(self.degree, b, h, mine, d).movedim(0, 1).reshape(b, self.degree * h, mine, d)

    def count(self, x: torch.Tensor) -> None:
        """What leaves this rank: all but its own share."""
        self.rank.sent["ulysses"] += x.nbytes * (self.degree - 1) // self.degree


class Ring:
    """Keys and values go around; partial results are merged by their log-sum-exp, in float32.

    Sends per rank and call: ``2 x B x S/N x H x D`` elements at each of ``N - 1`` hops, while the kernel works.
    """

    def __init__(self, rank: Rank) -> None:
        self.rank, self.now = rank, rank.now
        self.group, self.degree, self.index = rank.group("ring"), rank.degree("ring"), rank.index("ring")

    def __call__(self, inner: AttentionRun, call: AttentionCall) -> Any:
        """Attend to the keys and values of all ranks of the ring.

        Args:
            call: q ``[B, H, Sq, D]``; k, v ``[B, H, Sk, D]``, this rank's share.

        Returns:
            ``[B, H, Sq, D]``.
        """
        if self.group is None:
            return inner(call)
        ulysses = self.rank.degree("ulysses")
        sizes = [self.held(call, range(r * ulysses, (r + 1) * ulysses)) for r in range(self.degree)]
        kv, out, lse, pending, began = torch.stack((call.k, call.v)), None, None, None, 0
        for hop in range(self.degree):
            if hop + 1 < self.degree:
                ring = RingComm(self.group)
                shape = [*kv.shape[:3], sizes[(self.index - hop - 1) % self.degree], kv.shape[-1]]
                pending = ring.send_recv(kv, kv.new_empty(shape))
                ring.commit()
                began = self.rank.began()
                self.rank.sent["ring"] += kv.nbytes
            source = (self.index - hop) % self.degree
            shards = tuple(range(source * ulysses, (source + 1) * ulysses))
            part, part_lse = inner(call.but(k=kv[0], v=kv[1], with_lse=True, key_shards=shards))
            out, lse = update_out_and_lse(out, lse, part.transpose(1, 2), part_lse)
            if hop + 1 < self.degree and pending is not None:
                with self.rank.waiting("the ring", "ring", self.group, began=began):
                    ring.wait()
                kv = pending
        if out is None:  # a ring of no hops cannot be built
            raise RuntimeError("empty ring")
        return out.to(call.q.dtype).transpose(1, 2)

    def held(self, call: AttentionCall, shards: range) -> int:
        """Rows of keys that the ring rank with these shards holds."""
        patches = (self.now.patch,) if call.patches is None else call.patches
        return sum(length(spans_of(self.now, call.kind, p, s)) for p in patches for s in shards)


class Gather:
    """Brings the rows of all ranks together behind the last block.

    Sends per rank and step: ``B x n/N x width`` elements to each of the others, once.
    """

    def __init__(self, rank: Rank) -> None:
        self.rank, self.now = rank, rank.now
        self.group = rank.mesh.joint_group(("ring", "ulysses"))
        self.shards, self.select = rank.plan.shards, Selector()

    def __call__(self, inner: TrunkRun, rows: Rows) -> Rows | None:
        """This rank's rows in, the rows of the whole patch out; None where the blocks gave none."""
        out = inner(rows)
        if out is None or self.group is None:
            return out
        now, x = self.now, out.tokens.contiguous()
        counts = [length(now.layout.picture(now.patch, s)) for s in range(self.shards)]
        most = max(counts)
        if x.shape[1] < most:  # all_gather wants equal shapes; at most one row is added
            x = torch.cat((x, x.new_zeros(x.shape[0], most - x.shape[1], x.shape[2])), dim=1)
        parts = [torch.empty_like(x) for _ in counts]
        with self.rank.waiting("the rows of the other ranks", "gather", self.group):
            dist.all_gather(parts, x, group=self.group)
        self.rank.sent["gather"] += x.nbytes * (self.shards - 1)
        whole = self.in_order([p[:, :n] for p, n in zip(parts, counts, strict=True)])
        return out.but(tokens=whole)

    def in_order(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Rows by shard to rows by position."""
        now = self.now
        if now.patch is not None or now.layout.patches == 1:
            return torch.cat(parts, dim=1)
        # at full sequence a shard owns a part of every patch
        whole = parts[0].new_empty(parts[0].shape[0], now.layout.tokens, parts[0].shape[2])
        for s, part in enumerate(parts):
            whole.index_copy_(1, self.select.index(now.layout.picture(None, s), whole.device), part)
        return whole
