"""Where a process stands among the others of its run, and how it meets them. Torch is imported when they meet."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from xdit_core.errors import UsageError, XditError
from xdit_core.records import listed

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Place:
    """Where a process stands among the others.

    Args:
        address, port: of the store, which rank 0 serves.
        listen: file descriptor on which the launcher already listens for rank 0, so that no port can be lost to others.
        screen: file descriptors of the terminal's stdout and stderr, if the process' own go to a log.
        parent: process id of the launcher.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    address: str = ""
    port: int = 0
    listen: int | None = None
    screen: tuple[int, ...] = ()
    parent: int | None = None

    @staticmethod
    def of(env: Mapping[str, str], world: int) -> Place:
        """From the environment; without WORLD_SIZE the process is alone.

        Raises:
            UsageError: the environment does not fit a plan for ``world`` ranks.
        """
        by_hand = f"torchrun --nproc-per-node {world} -m xdit_core.worker plan.json"
        found = env.get("WORLD_SIZE", "1")
        if found != str(world):
            raise UsageError(f"the plan needs {world} processes but WORLD_SIZE is {found}; start it with {by_hand}.")
        if "WORLD_SIZE" not in env:
            return Place()
        try:
            rank, local_rank = int(env["RANK"]), int(env.get("LOCAL_RANK", "0"))
            local_world, port = int(env.get("LOCAL_WORLD_SIZE", found)), int(env.get("MASTER_PORT", "0"))
        except (KeyError, ValueError) as error:
            raise UsageError(f"RANK, LOCAL_RANK and MASTER_PORT must be numbers ({error}); start it with {by_hand}.") from error
        screen = tuple(int(fd) for fd in env.get("XDIT_SCREEN", "").split(",") if fd)
        listen = env.get("XDIT_LISTEN")
        parent = env.get("XDIT_PARENT")
        return Place(
            rank=rank,
            world=world,
            local_rank=local_rank,
            local_world=local_world,
            address=env.get("MASTER_ADDR", ""),
            port=port,
            listen=int(listen) if listen else None,
            screen=screen,
            parent=int(parent) if parent else None,
        )


def die_with(parent: int | None) -> None:
    """End this process when its launcher ends, however that happens. Without a known launcher nothing is done.

    Args:
        parent: the launcher's process id.
    """
    if parent is None:
        return
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != parent:  # it had died before the call above
            os._exit(1)
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def connect(place: Place, digest: str, device: str, timeout: float) -> Store:
    """Meet the other ranks and form the default process group, after making sure that all run the same plan.

    Args:
        digest: of the plan.
        device: ``cpu`` or ``cuda``; of the latter the current device is used.
        timeout: seconds that the launcher waits for signs of progress.

    Returns:
        What all ranks can write into and read.

    Raises:
        XditError: they do not.
    """
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    # Somewhat more than the launcher waits: it knows what every rank is doing and writes the better report.
    patience = timedelta(seconds=timeout + 10)
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun serves the store itself
    server = dist.TCPStore(  # type: ignore[attr-defined]
        place.address,
        place.port,
        place.world,
        is_master=place.rank == 0 and not agent,
        timeout=patience,
        wait_for_workers=False,
        master_listen_fd=place.listen if place.rank == 0 else None,
    )
    store = dist.PrefixStore("xdit", server)  # type: ignore[attr-defined]
    compare(store, digest, place, patience)
    dist.init_process_group(
        backend="nccl" if device == "cuda" else "gloo",
        store=store,
        rank=place.rank,
        world_size=place.world,
        timeout=patience,
        device_id=torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else None,
    )
    return store


def everyones(store: Store, name: str, text: str, place: Place) -> list[str]:
    """A text of each rank, by rank."""
    store.set(f"{name}/{place.rank}", text)
    return [store.get(f"{name}/{rank}").decode() for rank in range(place.world)]


def compare(store: Store, digest: str, place: Place, patience: Any) -> None:
    """Ranks with different plans would wait for each other for ever, or compute something else without a word.

    Raises:
        XditError: names the ranks that differ from rank 0, or that did not come.
    """
    keys = [f"digest/{rank}" for rank in range(place.world)]
    store.set(keys[place.rank], digest)
    try:
        store.wait(keys, patience)
    except RuntimeError as error:
        absent = [rank for rank, key in enumerate(keys) if not store.check([key])]  # raises as well if rank 0 has gone
        raise XditError(
            f"{'ranks' if len(absent) > 1 else 'rank'} {listed(absent)} of {place.world} did not come within {patience.total_seconds():.0f} s; "
            "start all nodes, and see whether they reach this one."
        ) from error
    found = [store.get(key).decode() for key in keys]
    other = [rank for rank, value in enumerate(found) if value != found[0]]
    if other:
        raise XditError(
            f"{'ranks' if len(other) > 1 else 'rank'} {listed(other)} of {place.world} got another plan than rank 0; "
            "copy one plan.json to every node and start all ranks again."
        )
