"""Collectives of parts that differ in size, and a view of the collectives that other libraries make."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from xdit_core.parallel.rank import Rank


def gather_parts(
    mine: torch.Tensor, sizes: Sequence[int], dim: int, group: dist.ProcessGroup | None, async_op: bool = False
) -> tuple[list[torch.Tensor], Any]:
    """Gather the parts of all ranks of a group. The parts may differ in size along one dim.

    Args:
        mine: the part of this rank.
        sizes: sizes of the parts along ``dim``, in the order of the ranks of the group.
        dim: the dim along which the parts differ.
        group: the process group, None for this rank alone.
        async_op: do not wait. The parts have values once the handle has been waited for.

    Returns:
        The parts, and a handle, which must be kept until it was waited for; None if this call has waited.
    """
    most = max(sizes)
    if mine.shape[dim] < most:  # all_gather wants equal shapes
        shape = list(mine.shape)
        shape[dim] = most - shape[dim]
        mine = torch.cat((mine, mine.new_zeros(shape)), dim=dim)
    mine = mine.contiguous()
    buffers = [torch.empty_like(mine) for _ in sizes]
    work = dist.all_gather(buffers, mine, group=group, async_op=async_op)
    parts = [buffer.narrow(dim, 0, size) for buffer, size in zip(buffers, sizes, strict=True)]
    return parts, (work, mine) if async_op else None


class CollectiveWatch(TorchDispatchMode):
    """Counts the bytes of collectives that another library makes, and tells the observer when this rank waits for them.

    Args:
        rank: this rank.
        group: the process group of these collectives.
        name: under which their bytes are counted, and the axis that their waits belong to.
        what: what is waited for, in words.
    """

    def __init__(self, rank: Rank, group: dist.ProcessGroup | None, name: str, what: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rank, self.group, self.name, self.what = rank, group, name, what
        self._others = dist.get_world_size(group) - 1
        self._wait = ExitStack()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._wait.close()
        if func.namespace == "c10d":
            operation = func.overloadpacket.__name__
            self.rank.sent[self.name] += self._bytes_sent(operation, args)
            group = None if operation in ("send", "recv_") else self.group  # messages are no collectives
            self._wait.enter_context(self.rank.waiting(self.what, self.name, group))  # until the next operation
        return func(*args, **(kwargs or {}))

    def __exit__(self, *details: Any) -> None:
        self._wait.close()
        super().__exit__(*details)  # type: ignore[no-untyped-call]

    def _bytes_sent(self, operation: str, args: Any) -> int:
        """What this rank sends: its part to all others in a gather, about two parts in all in a reduction."""
        if operation not in ("allgather_", "allreduce_", "send"):
            return 0
        mine: int = sum(x.nbytes for x in args[1 if operation == "allgather_" else 0])
        if operation == "allreduce_":
            return 2 * mine * self._others // (self._others + 1)
        return mine if operation == "send" else mine * self._others
