"""Which part of a tensor of the checkpoint a parameter is: strategies that divide weights say it, loading reads it.

A strategy changes the modules while parameters have shapes and no values. ``keep_slice`` makes a parameter smaller and
remembers the place of what is left in the whole tensor; a parameter that torch divides (``DTensor``) knows its place by
itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

Range = tuple[int, int]  # start and stop


@dataclass(frozen=True)
class TensorSlice:
    """A part of a tensor.

    Args:
        shape: of the whole tensor.
        kept: for each dim the ranges of indices that are kept, one behind another.
    """

    shape: tuple[int, ...]
    kept: tuple[tuple[Range, ...], ...]

    @staticmethod
    def whole(shape: Sequence[int]) -> TensorSlice:
        """All of a tensor."""
        return TensorSlice(tuple(shape), tuple(((0, size),) for size in shape))

    @property
    def kept_shape(self) -> tuple[int, ...]:
        """The shape of the part."""
        return tuple(sum(stop - start for start, stop in ranges) for ranges in self.kept)

    def keep(self, dim: int, ranges: Sequence[Range]) -> TensorSlice:
        """A part of this part.

        Args:
            ranges: of indices of this part along ``dim``, one behind another.
        """
        kept = []
        for start, stop in ranges:
            before = 0
            for a, b in self.kept[dim]:
                first, last = max(start - before, 0), min(stop - before, b - a)
                if first < last:
                    kept.append((a + first, a + last))
                before += b - a
        return replace(self, kept=(*self.kept[:dim], tuple(kept) or ((0, 0),), *self.kept[dim + 1 :]))

    def read(self, source: Callable[[tuple[slice, ...]], torch.Tensor]) -> torch.Tensor:
        """The values of the part.

        Args:
            source: returns a slice of the whole tensor; it is asked for nothing else than the part.
        """
        for dim, ranges in enumerate(self.kept):
            if len(ranges) > 1:
                alone = [replace(self, kept=(*self.kept[:dim], (one,), *self.kept[dim + 1 :])) for one in ranges]
                return torch.cat([part.read(source) for part in alone], dim=dim)
        return source(tuple(slice(*ranges[0]) for ranges in self.kept))


def slice_of(tensor: torch.Tensor) -> TensorSlice:
    """Return which part of its tensor in the checkpoint a parameter is; all of it if nobody says otherwise."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset as local_part

    known: TensorSlice = getattr(tensor, "tensor_slice", None) or TensorSlice.whole(tensor.shape)
    if isinstance(tensor, DTensor):
        sizes, starts = local_part(tensor.shape, tensor.device_mesh, tensor.placements)
        for dim, (start, size) in enumerate(zip(starts, sizes, strict=True)):
            known = known.keep(dim, [(start, start + size)])
    return known


def keep_slice(module: nn.Module, name: str, dim: int, ranges: Sequence[Range]) -> None:
    """Let a parameter without values be only a part of its tensor in the checkpoint; only that is read later.

    Args:
        name: of a parameter of this module.
        ranges: start and stop of the indices to keep along ``dim``, one behind another.
    """
    parameter = module.get_parameter(name)
    part = slice_of(parameter).keep(dim, ranges)
    smaller = nn.Parameter(parameter.new_empty(part.kept_shape), requires_grad=False)
    smaller.tensor_slice = part  # type: ignore[attr-defined]
    module.register_parameter(name, smaller)
