"""A world without processes: torch's ``fake`` process group, on which collectives do nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist


@contextmanager
def fake_world(world: int, rank: int = 0) -> Iterator[None]:
    """Be one rank of ``world``: meshes and groups can be built and looked at, in milliseconds.

    Args:
        world: number of ranks to pretend.
        rank: which of them to be.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()
