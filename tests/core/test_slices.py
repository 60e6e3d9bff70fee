"""Which part of a tensor of the checkpoint a parameter is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from xdit_core import TensorSlice, keep_slice, slice_of
from xdit_core.testing.world import fake_world

WHOLE = torch.arange(12 * 6).view(12, 6)


@pytest.mark.parametrize(
    ("steps", "rows", "columns"),
    [
        ([], range(12), range(6)),
        ([(0, [(3, 6)])], (3, 4, 5), range(6)),
        ([(1, [(1, 2), (4, 6)])], range(12), (1, 4, 5)),
        ([(0, [(0, 3), (6, 9)]), (1, [(2, 4)])], (0, 1, 2, 6, 7, 8), (2, 3)),
        ([(0, [(0, 3), (6, 9)]), (0, [(2, 5)])], (2, 6, 7), range(6)),
        ([(0, [(0, 1), (3, 4)]), (1, [(0, 1), (5, 6)])], (0, 3), (0, 5)),
        ([(0, [(2, 4)]), (0, [(2, 2)])], (), range(6)),
    ],
)
def test_parts_of_parts(steps, rows, columns):
    part = TensorSlice.whole(WHOLE.shape)
    for dim, ranges in steps:
        part = part.keep(dim, ranges)
    want = WHOLE[list(rows)][:, list(columns)]
    assert part.kept_shape == want.shape
    assert torch.equal(part.read(WHOLE.__getitem__), want)


def test_a_parameter_remembers_its_part():
    linear = nn.Linear(6, 12, device="meta")
    keep_slice(linear, "weight", 0, [(4, 8)])
    keep_slice(linear, "weight", 1, [(0, 3)])
    assert linear.weight.shape == (4, 3) and linear.weight.is_meta
    assert slice_of(linear.weight) == TensorSlice((12, 6), (((4, 8),), ((0, 3),)))
    assert slice_of(linear.bias) == TensorSlice.whole((12,))


@pytest.mark.parametrize(("rank", "rows"), [(0, (0, 3)), (3, (9, 12))])
def test_a_tensor_that_torch_divides(rank, rows):
    """Strategies may divide parameters with torch's own tools, whose parameters know their place."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    with fake_world(4, rank):
        made = distribute_tensor(torch.empty(12, 6, device="meta"), init_device_mesh("cpu", (4,)), [Shard(0)])
        assert slice_of(made) == TensorSlice((12, 6), ((rows,), ((0, 6),)))
