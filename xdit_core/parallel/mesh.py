"""The device mesh of one engine: named axes over ranks, chatty axes innermost."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from math import prod
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from xdit_core.errors import UsageError
from xdit_core.records import Axis

MESSAGE_CTAS = 4  # thread blocks of the GPU that a communicator for messages may use; the rest computes


class Mesh:
    """Process groups by axis name. Every engine has its own; nothing is global.

    A communicator costs memory on the GPU and time at the start, so there are few: axes of degree 1 have none, axes
    over the same ranks share one, and the world group is used again where its ranks are asked for. All have the
    timeout of the world group.

    Args:
        axes: outermost first, with degrees.
        device: ``cpu`` or ``cuda``.

    All ranks of the default process group must construct it, in the same order as their other meshes.
    """

    def __init__(self, axes: Sequence[Axis], device: str) -> None:
        self.axes, self.device = tuple(axes), device
        self.degrees = {a.name: a.degree or 1 for a in axes}
        self.world = prod(self.degrees.values())
        self.rank = 0
        self._groups: dict[str, dist.ProcessGroup] = {}  # by axis
        self._shared: dict[tuple[tuple[int, ...], ...], dist.ProcessGroup | None] = {}  # by the ranks of all groups
        self._own: list[dist.ProcessGroup] = []
        self._submeshes: dict[str, DeviceMesh] = {}
        if self.world == 1:
            return
        processes = dist.get_world_size() if dist.is_initialized() else 0
        if processes != self.world:
            raise UsageError(
                f"the plan needs {self.world} ranks and this process belongs to "
                f"{processes or 'no group'}{' of ranks' if processes else ''}; start it with xdit-launch, or with "
                f"torchrun --nproc-per-node {self.world} and torch.distributed.init_process_group."
            )
        self.rank = dist.get_rank()
        for axis in self.axes:
            if self.degrees[axis.name] > 1:
                lines = self.lines((axis.name,))
                group = self._new(lines, messages=True) if axis.messages else self._group_of(lines)
                self._groups[axis.name] = cast(dist.ProcessGroup, group)

    def index(self, axis: str) -> int:
        """This rank's coordinate along an axis; 0 if there is no such axis."""
        if axis not in self.degrees:
            return 0
        names = list(self.degrees)
        stride = prod(self.degrees[name] for name in names[names.index(axis) + 1 :])
        return self.rank // stride % self.degrees[axis]

    def group(self, axis: str) -> dist.ProcessGroup | None:
        """The ranks that differ from this one along ``axis`` only; None if that is this rank alone."""
        return self._groups.get(axis)

    def submesh(self, axis: str) -> DeviceMesh | None:
        """A device mesh along an axis, None where this rank is alone."""
        group = self.group(axis)
        if group is not None and axis not in self._submeshes:
            self._submeshes[axis] = DeviceMesh.from_group(group, self.device, mesh_dim_names=(axis,))
        return self._submeshes.get(axis)

    def ranks(self, axis: str) -> list[int]:
        """Global ranks of ``group(axis)`` by coordinate."""
        group = self.group(axis)
        return [self.rank] if group is None else dist.get_process_group_ranks(group)

    def second_group(self, axis: str) -> dist.ProcessGroup | None:
        """Another communicator over the ranks of ``group(axis)``, for traffic that must not queue behind the
        first's."""
        if self.group(axis) is None:
            return None
        return self._new(self.lines((axis,)), messages=any(a.name == axis and a.messages for a in self.axes))

    def joint_group(self, axes: Sequence[str]) -> dist.ProcessGroup | None:
        """The ranks that differ from this one along any of ``axes``, in mesh order; None if that is this rank alone."""
        wide = [a for a in axes if self.degrees.get(a, 1) > 1]
        return self._group_of(self.lines(wide)) if wide else None

    def first_group(self, axes: Sequence[str], count: int) -> dist.ProcessGroup | None:
        """The first ``count`` ranks of each ``joint_group(axes)``, in mesh order; None on the others, and if it is one
        rank."""
        return None if self.world == 1 or count < 2 else self._group_of([line[:count] for line in self.lines(axes)])

    def host_group(self, axes: Sequence[str]) -> dist.ProcessGroup | None:
        """``joint_group(axes)`` for objects and other small things of the host, which a GPU should not carry.

        Where the groups of the mesh are on GPUs, it is another one beside them; then all its ranks call this at the
        same time.
        """
        group = self.joint_group(axes)
        on_host = group is None or dist.get_backend(group) in ("gloo", "fake")
        return group if on_host else self.decision_group(axes)

    def decision_group(self, axes: Sequence[str]) -> dist.ProcessGroup | None:
        """A communicator of the host over ``joint_group(axes)``, for small numbers; None if that is this rank alone.

        Only the ranks in it need to call this, all at the same time.
        """
        line = next((line for line in self.lines(axes) if self.rank in line), []) if self.world > 1 else []
        if len(line) < 2:
            return None
        group: dist.ProcessGroup = dist.new_group(
            line, timeout=self._timeout(), backend="gloo", use_local_synchronization=True
        )
        self._own.append(group)
        return group

    def lines(self, axes: Sequence[str]) -> list[list[int]]:
        """All sets of global ranks that differ along ``axes`` only, each in mesh order."""
        names = list(self.degrees)
        inner = [names.index(a) for a in names if a in axes]
        outer = [i for i in range(len(names)) if i not in inner]
        size = prod(self.degrees[names[i]] for i in inner)
        grid = torch.arange(self.world).view(*self.degrees.values())
        result: list[list[int]] = grid.permute(*outer, *inner).reshape(-1, size).tolist()
        return result

    def _group_of(self, lines: Sequence[Sequence[int]]) -> dist.ProcessGroup | None:
        """This rank's group among groups that divide the ranks; what was made for the same division is used again."""
        if list(map(list, lines)) == [list(range(self.world))]:
            return dist.group.WORLD
        key = tuple(map(tuple, lines))
        if key not in self._shared:
            self._shared[key] = self._new(lines)
        return self._shared[key]

    def _new(self, lines: Sequence[Sequence[int]], messages: bool = False) -> dist.ProcessGroup | None:
        """Make groups, and return that of this rank, None if it is in none. Every rank must enter every ``new_group``.

        Args:
            messages: between two ranks at a time, so that few thread blocks of the GPU suffice.
        """
        timeout, mine = self._timeout(), None
        for line in lines:
            options = message_options() if messages else None
            group: dist.ProcessGroup = dist.new_group(list(line), timeout=timeout, pg_options=options)
            if self.rank in line:
                mine = group
                self._own.append(group)
        return mine

    def _timeout(self) -> timedelta | None:
        """The timeout of the world group, which torch does not hand on to other groups; None if it has none."""
        world: Any = dist.group.WORLD
        try:
            timeout: timedelta = world._get_backend(torch.device(self.device)).options._timeout
        except (AttributeError, RuntimeError):
            return None
        return timeout

    def close(self) -> None:
        """Release the groups that this mesh made."""
        own, self._own = self._own, []
        self._groups, self._submeshes, self._shared = {}, {}, {}
        if dist.is_initialized():
            for group in reversed(own):  # in one order on all ranks
                dist.destroy_process_group(group)


def message_options() -> Any:
    """The options of a group for messages; None for the defaults."""
    if dist.get_backend() != "nccl":
        return None
    options = dist.ProcessGroupNCCL.Options()  # type: ignore[attr-defined]
    config: Any = getattr(options, "config", None)
    if hasattr(config, "max_ctas"):  # not with every version of NCCL
        config.max_ctas = MESSAGE_CTAS
    return options
