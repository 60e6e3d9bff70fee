"""The device mesh of one engine: named axes over ranks, chatty axes innermost."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from xdit_core.errors import UsageError
from xdit_core.records import Axis


class Mesh:
    """Process groups by axis name. Every engine has its own; nothing is global.

    Args:
        axes: outermost first, with degrees.
        device: ``cpu`` or ``cuda``.

    All ranks of the default process group must construct it, in the same order as their other meshes.
    """

    def __init__(self, axes: Sequence[Axis], device: str) -> None:
        self.axes = tuple(axes)
        self.degrees = {a.name: a.degree or 1 for a in axes}
        self.world = prod(self.degrees.values())
        self.device_mesh: DeviceMesh | None = None
        self._own: list[dist.ProcessGroup] = []
        if self.world > 1:
            processes = dist.get_world_size() if dist.is_initialized() else 0
            if processes != self.world:
                raise UsageError(
                    f"the plan needs {self.world} ranks and this process belongs to "
                    f"{processes or 'no group'}{' of ranks' if processes else ''}; start it with xdit-launch, or with "
                    f"torchrun --nproc-per-node {self.world} and torch.distributed.init_process_group."
                )
            self.device_mesh = init_device_mesh(
                device, tuple(self.degrees.values()), mesh_dim_names=tuple(self.degrees)
            )
        self.rank = dist.get_rank() if self.world > 1 else 0

    def index(self, axis: str) -> int:
        """This rank's coordinate along an axis; 0 if there is no such axis."""
        if self.device_mesh is None or axis not in self.degrees:
            return 0
        return self.device_mesh.get_local_rank(axis)

    def group(self, axis: str) -> dist.ProcessGroup | None:
        """The ranks that differ from this one along ``axis`` only; None if that is this rank alone."""
        if self.device_mesh is None or self.degrees.get(axis, 1) == 1:
            return None
        return self.device_mesh.get_group(axis)

    def submesh(self, axis: str) -> DeviceMesh | None:
        """The part of the device mesh along an axis, None where this rank is alone."""
        return None if self.device_mesh is None or self.degrees.get(axis, 1) == 1 else self.device_mesh[axis]

    def ranks(self, axis: str) -> list[int]:
        """Global ranks of ``group(axis)`` by coordinate."""
        group = self.group(axis)
        return [self.rank] if group is None else dist.get_process_group_ranks(group)

    def second_group(self, axis: str) -> dist.ProcessGroup | None:
        """Another communicator over the ranks of ``group(axis)``, for traffic that must not queue behind the
        first's."""
        if self.group(axis) is None:
            return None
        lines = self.lines((axis,))
        groups = [dist.new_group(line) for line in lines]  # every rank must enter every new_group
        return self._keep(groups, lines)

    def joint_group(self, axes: Sequence[str]) -> dist.ProcessGroup | None:
        """The ranks that differ from this one along any of ``axes``, in mesh order; None if that is this rank alone."""
        wide = [a for a in axes if self.degrees.get(a, 1) > 1]
        if len(wide) < 2:
            return self.group(wide[0]) if wide else None
        lines = self.lines(wide)
        return self._keep([dist.new_group(line) for line in lines], lines)

    def first_group(self, axes: Sequence[str], count: int) -> dist.ProcessGroup | None:
        """The first ``count`` ranks of each ``joint_group(axes)``, in mesh order; None on the others, and if it is one
        rank."""
        if self.device_mesh is None or count < 2:
            return None
        lines = [line[:count] for line in self.lines(axes)]
        groups = [dist.new_group(line) for line in lines]  # every rank must enter every new_group
        return self._keep(groups, lines) if any(self.rank in line for line in lines) else None

    def decision_group(self, axes: Sequence[str]) -> dist.ProcessGroup | None:
        """A communicator of the host over ``joint_group(axes)``, for small numbers; None if that is this rank alone.

        Only the ranks in it need to call this, all at the same time.
        """
        line = (
            next((line for line in self.lines(axes) if self.rank in line), []) if self.device_mesh is not None else []
        )
        if len(line) < 2:
            return None
        group: dist.ProcessGroup = dist.new_group(line, backend="gloo", use_local_synchronization=True)
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

    def _keep(self, groups: Sequence[dist.ProcessGroup], lines: Sequence[Sequence[int]]) -> dist.ProcessGroup:
        self._own.extend(g for g, line in zip(groups, lines, strict=True) if self.rank in line)
        return next(g for g, line in zip(groups, lines, strict=True) if self.rank in line)

    def close(self) -> None:
        """Release the groups that this mesh made."""
        if self.device_mesh is None or not dist.is_initialized():
            return
        groups = [self.device_mesh.get_group(a) for a in self.degrees]
        for group in reversed(list(dict.fromkeys([*groups, *self._own]))):  # in one order on all ranks
            if group is not dist.group.WORLD:
                dist.destroy_process_group(group)
        self.device_mesh = None
