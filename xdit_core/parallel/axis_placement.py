"""The placement of patch tensors whose values are on the first rank of an axis, as under PipeFusion."""

from __future__ import annotations

import torch
import torch.distributed as dist

from xdit_core.errors import LazyError
from xdit_core.parallel.patch_tensor import PatchTensor
from xdit_core.parallel.placements import PatchPlacement
from xdit_core.parallel.rank import Rank


class AxisPlacement(PatchPlacement):
    """The values of patch tensors are on the first rank of an axis; reading them whole brings them to all its ranks.

    Args:
        rank: this rank.
        axis: of the mesh.
    """

    def __init__(self, rank: Rank, axis: str) -> None:
        super().__init__()
        self.rank, self.axis, self.group = rank, axis, rank.group(axis)
        self.root = rank.mesh.ranks(axis)[0]
        self.evaluates = rank.index(axis) == 0

    def materialize(self, tensor: PatchTensor) -> torch.Tensor:
        """The plain tensor; a collective over the axis.

        Raises:
            LazyError: the other ranks did not come within half of the run's ``timeout``.
        """
        if self.evaluates:
            whole = torch.cat([tensor.patch(m) for m in range(tensor.patches)], dim=tensor.patched_dim).contiguous()
        else:
            whole = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        if self.group is None:
            return whole
        with self.rank.waiting(f"all ranks of {self.axis} to bring the latents together", self.axis, self.group):
            self.rank.wait_for_all(dist.broadcast(whole, self.root, group=self.group, async_op=True), read_alone)
        return whole

    def report(self, op: str) -> None:
        """An operation of the pipeline or its scheduler needs all rows at once."""
        super().report(op)
        self.rank.slow[op] += 1


def read_alone(patience: str) -> LazyError:
    """The error for latents that one rank reads and the others do not."""
    return LazyError(
        "latents whose patches are still under way were read on this rank, and the others did not join within "
        f"{patience}; a callback or print must read them on all ranks, or use xdit_core.Preview."
    )
