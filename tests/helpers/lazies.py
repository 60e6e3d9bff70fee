"""Patch tensors for tests, and their comparison with plain ones."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

from xdit_core.parallel.patch_tensor import PatchTensor
from xdit_core.parallel.placements import PatchPlacement

aten = torch.ops.aten
B, C, H, W = 2, 4, 10, 5
CUTS = (0, 3, 4, 8, 10)
MODES = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}


def base(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape or (B, C, H, W), generator=torch.Generator().manual_seed(seed)).to(dtype)


def lazy(
    x: torch.Tensor,
    placement: PatchPlacement,
    dim: int = -2,
    bounds: tuple[int, ...] = CUTS,
    log: list[int] | None = None,
) -> PatchTensor:
    """A patch tensor with the values of x; ``log`` gets the patches in the order of their evaluation."""
    values = x.clone()

    def cell(m: int, a: int, b: int) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            if log is not None:
                log.append(m)
            return values.narrow(dim, a, b - a).clone()

        return run

    cells = [cell(m, a, b) for m, (a, b) in enumerate(pairwise(bounds))]
    return PatchTensor.make(
        cells, shape=x.shape, dim=dim, bounds=bounds, dtype=x.dtype, device=x.device, placement=placement
    )


def same(a: Any, b: Any) -> None:
    """Bit for bit, also of nested results; strides too where a patch tensor claims some."""
    if isinstance(b, (list, tuple)):
        assert len(a) == len(b)
        for p, q in zip(a, b, strict=True):
            same(p, q)
    elif isinstance(b, torch.Tensor):
        assert a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
        if isinstance(a, PatchTensor):
            assert a.stride() == b.stride()
            pieces = [a.patch(m) for m in range(a.patches)] if a.placement.evaluates else []
            a = a.materialize()
            if pieces:
                assert torch.equal(torch.cat(pieces, -1 if b.ndim == 0 else _dim_of(pieces, b)), b)
        assert torch.equal(a, b)
    else:
        assert a == b


def _dim_of(pieces: list[torch.Tensor], whole: torch.Tensor) -> int:
    for d in range(whole.ndim):
        if sum(p.shape[d] for p in pieces) == whole.shape[d] and len(pieces) > 1:
            return d
    return 0


y, row, col = base(seed=1), base(H, 1, seed=2), base(W, seed=3)
chan, half, sigma = base(1, C, 1, 1, seed=4), base(seed=5, dtype=torch.float16), torch.tensor(0.7, dtype=torch.float64)
mask = base(seed=6) > 0
