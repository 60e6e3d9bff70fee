"""A world without processes: torch's ``fake`` process group, on which collectives do nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist


@contextmanager
def fake_world(world: int, rank: int = 0) -> Iterator[None]:
    """Be one rank of ``world``: meshes, groups and engines can be built and looked at.

    Collectives leave their outputs as they are, so results are wrong and the path of the host is the real one.

    Args:
        world: number of ranks to pretend.
        rank: which of them to be.
    """
    from torch.testing._internal.distributed import fake_pg  # noqa: F401 - makes the backend known

    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("fake", store=store, rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()
