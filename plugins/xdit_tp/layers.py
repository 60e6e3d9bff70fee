"""Layers of which each rank has a part: plain modules over local tensors, with one collective behind each.

A layer whose columns are divided needs none of these: it is a ``nn.Linear`` with fewer rows of its weight. Inside a
compiled block the functional collectives are used, since the compiler can follow them; elsewhere those that work in
place. Shapes: ``N`` ranks; ``[..., D]`` any leading dims, width D.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.nn.functional as F
from torch import nn

from xdit_core import Awaited, Rank

# the second name is that of older versions of torch, and warns in newer ones
all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Parts:
    """The ranks that have the other parts, and what is exchanged with them.

    Sends per rank: ``sum`` 2 x (N-1)/N of a tensor, ``gather`` (N-1) times this rank's part.
    """

    def __init__(self, rank: Rank, group: dist.ProcessGroup) -> None:
        self.degree, self.index = rank.degree("tp"), rank.index("tp")
        self.group, self.name = group, group.group_name
        self._sent, self._observer = rank.sent, rank.observer
        self._wait = Awaited("the parts of the other ranks", "tp", group)

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks.

        Args:
            x: contiguous, and written to unless it is being compiled; nothing happens if it is empty, as a stream of
                text may be that belongs to another patch.
        """
        if not x.numel():
            return x
        if torch.compiler.is_compiling():
            total: torch.Tensor = functional.all_reduce(x, "sum", self.name)
            return total
        self._sent["tp"] += 2 * x.nbytes * (self.degree - 1) // self.degree
        with self._observer.waiting(self._wait):
            dist.all_reduce(x, group=self.group)
        return x

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """The parts of all ranks side by side: ``[..., D/N]`` to ``[..., D]``."""
        if not x.numel():
            return x.new_empty(*x.shape[:-1], x.shape[-1] * self.degree)
        if torch.compiler.is_compiling():
            whole: torch.Tensor = functional.all_gather_tensor(x, x.dim() - 1, self.name)
            return whole
        self._sent["tp.modulation"] += x.nbytes * (self.degree - 1)
        parts = x.new_empty(self.degree * x.shape[0], *x.shape[1:])
        with self._observer.waiting(self._wait):
            all_gather(parts, x, group=self.group)
        # a view where there is one row, as there is of a modulation
        return parts.view(self.degree, *x.shape).movedim(0, -2).flatten(-2)


class RowwiseLinear(nn.Linear):
    """A matrix of which this rank has some columns: ``[..., I/N]`` to ``[..., O]``, summed over the ranks.

    The first rank adds the bias to its part of the sum.
    """

    def __init__(self, linear: nn.Linear, parts: Parts) -> None:
        nn.Module.__init__(self)  # the parameters are those of ``linear``
        self.in_features, self.out_features = linear.weight.shape[1], linear.out_features
        self.weight, self.parts = linear.weight, parts
        self.register_parameter("bias", linear.bias if parts.index == 0 else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The product with all columns."""
        return self.parts.sum(F.linear(x, self.weight, self.bias))


class GatheredLinear(nn.Linear):
    """A matrix of which this rank has some rows: ``[..., I]`` to ``[..., O]``, gathered from the ranks."""

    def __init__(self, linear: nn.Linear, parts: Parts) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.weight.shape[0]
        self.weight, self.bias, self.parts = linear.weight, linear.bias, parts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The product with all rows."""
        return self.parts.gather(F.linear(x, self.weight, self.bias))


class RMSNormAcross(nn.Module):
    """An RMS norm over all columns where a rank has its part of them: ``[..., D/N]``; the squares are summed.

    Sends per rank: ``2 x (N-1)/N`` float32 numbers a row.
    """

    def __init__(self, norm: Any, parts: Parts, columns: int) -> None:
        super().__init__()
        self.weight, self.parts, self.columns = norm.weight, parts, columns
        self.eps = norm.eps or torch.finfo(norm.weight.dtype).eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` over the root of the mean of its squares, times this rank's weights."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        squares = self.parts.sum(length.square_())
        normed: torch.Tensor = (x * squares.div_(self.columns).add_(self.eps).rsqrt_()).to(x.dtype)
        weight: torch.Tensor = self.weight.to(x.dtype)
        return normed * weight
