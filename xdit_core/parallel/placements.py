"""Placements: which ranks hold the values of a patch tensor, and how its whole value is brought together."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from xdit_core.parallel.patch_tensor import PatchTensor


class PatchPlacement:
    """Says where the values of a patch tensor are. This base class is for one rank, which computes every patch itself.

    Attributes:
        evaluates: False on ranks that never have values; their patch tensors hold shapes and no cells.
        materialized: how often each operation forced a patch tensor to materialize.
    """

    evaluates: bool = True

    def __init__(self) -> None:
        self.materialized: Counter[str] = Counter()

    def materialize(self, tensor: PatchTensor) -> torch.Tensor:
        """Return the whole value of a patch tensor, in memory that nothing else refers to."""
        return torch.cat([tensor.patch(m) for m in range(tensor.patches)], dim=tensor.patched_dim)

    def report(self, op: str) -> None:
        """An operation, say ``aten.mean.default``, is about to materialize a patch tensor."""
        self.materialized[op] += 1


def evaluated(latents: Any) -> torch.Tensor | None:
    """Return the values of latents where this rank has them, without an exchange.

    A patch that is under way is waited for.

    Args:
        latents: a tensor, a patch tensor or None.
    """
    if isinstance(latents, PatchTensor):
        latents = latents.rows(0, latents.bounds[-1]) if latents.placement.evaluates else None
    return latents if isinstance(latents, torch.Tensor) else None


class LocalPlacement(PatchPlacement):
    """For a patch tensor that belongs to one rank alone; materializing it needs no collective."""
