"""Find out which rank a process is, and meet the other ranks. Torch is imported only for meeting."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from xdit_core.errors import UsageError, XditError
from xdit_core.machine import SHARING, gpu_backend, host_name
from xdit_core.observe.observer import Observer
from xdit_core.observe.status import Phase, Status
from xdit_core.records import join_words
from xdit_core.worker.control import VARIABLE

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

SOON = 5.0  # seconds after which a wait is told
LOOK = timedelta(seconds=2)  # between two looks at who is absent
MOST_NAMED = 32  # ranks
COLUMNS_VARIABLE = "XDIT_COLUMNS"  # of the environment: columns of the terminal at the launcher, if it has one


@dataclass(frozen=True)
class RankEnv:
    """The place of a process among the ranks of its run.

    Args:
        address, port: address of the store, which rank 0 serves.
        listen: file descriptor on which the launcher already listens for rank 0, so that no other program can take the
            port.
        screen: file descriptors of the terminal's stdout and stderr, if those of the process go to a log.
        parent: process id of the launcher.
        columns: width of the terminal to which the launcher passes on the second of ``screen``; None if it is not a
            terminal.
        control: file descriptor of the control connection of a rank that answers requests, None if it draws the plan.
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
    columns: int | None = None
    control: int | None = None

    @staticmethod
    def of(env: Mapping[str, str], world: int) -> RankEnv:
        """Read the environment; without WORLD_SIZE the process is the only rank.

        Raises:
            UsageError: the environment does not fit a plan for ``world`` ranks.
        """
        by_hand = f"torchrun --nproc-per-node {world} -m xdit_core.worker plan.json"
        size = env.get("WORLD_SIZE", "1")
        if size != str(world):
            raise UsageError(f"the plan needs {world} processes but WORLD_SIZE is {size}; start it with {by_hand}.")
        if "WORLD_SIZE" not in env and env.get("RANK", "0") == "0":
            return RankEnv()
        try:
            rank, local_rank = int(env["RANK"]), int(env.get("LOCAL_RANK", "0"))
            local_world, port = int(env.get("LOCAL_WORLD_SIZE", size)), int(env.get("MASTER_PORT", "0"))
        except (KeyError, ValueError) as error:
            raise UsageError(
                f"RANK, LOCAL_RANK and MASTER_PORT must be numbers ({error}); start it with {by_hand}."
            ) from error
        for name, value, count in (("RANK", rank, world), ("LOCAL_RANK", local_rank, local_world)):
            if not 0 <= value < count:
                raise UsageError(f"{name}={value} is not from 0 to {count - 1}; start it with {by_hand}.")
        if world > 1 and (not env.get("MASTER_ADDR") or not 0 < port < 65536):
            raise UsageError(f"MASTER_ADDR and MASTER_PORT do not say where rank 0 is met; start it with {by_hand}.")
        screen = tuple(int(fd) for fd in env.get("XDIT_SCREEN", "").split(",") if fd)
        listen = env.get("XDIT_LISTEN")
        parent, columns, control = env.get("XDIT_PARENT"), env.get(COLUMNS_VARIABLE), env.get(VARIABLE)
        return RankEnv(
            rank=rank,
            world=world,
            local_rank=local_rank,
            local_world=local_world,
            address=env.get("MASTER_ADDR", ""),
            port=port,
            listen=int(listen) if listen else None,
            screen=screen,
            parent=int(parent) if parent else None,
            columns=int(columns) if columns else None,
            control=int(control) if control else None,
        )


def die_with(parent: int | None) -> None:
    """End this process when its launcher ends, even if that is killed. Without a known launcher, do nothing.

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


def waiting_to_start(ranks: Sequence[int]) -> Status:
    """Return the status of a rank that waits for other ranks to start; `not_started` reads it."""
    named = tuple(ranks[:MOST_NAMED])
    what = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, named))} to start"
    return Status(Phase.CONNECTING, waiting_for=what, peers=named)


def not_started(status: Status) -> tuple[int, ...]:
    """Return the ranks whose start a rank waits for; none if they have started."""
    return status.peers if status.phase == Phase.CONNECTING else ()


def connect(place: RankEnv, digest: str, device: str, timeout: float, observer: Observer) -> Store:
    """Meet the other ranks and form the default process group, after making sure that all run the same plan.

    Args:
        digest: digest of the plan.
        device: ``cpu``, or ``cuda`` for the current CUDA device.
        timeout: seconds that the launcher waits for signs of progress.
        observer: told whom this rank waits for.

    Returns:
        A store that all ranks can write and read.

    Raises:
        XditError: some ranks do not come, or have another plan.
    """
    import torch
    import torch.distributed as dist

    # Somewhat more than the launcher waits: it knows what every rank is doing and writes the better report.
    patience = timedelta(seconds=timeout + 10)
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun serves the store itself
    serves = place.rank == 0 and not agent
    observer.status(waiting_to_start(range(1, place.world) if serves else (0,)))
    try:
        with announced(f"rank {place.rank} waits for rank 0 at {place.address}:{place.port}", quiet=serves):
            server = dist.TCPStore(  # type: ignore[attr-defined]
                place.address,
                place.port,
                place.world,
                is_master=serves,
                timeout=patience,
                wait_for_workers=False,
                master_listen_fd=place.listen if place.rank == 0 else None,
            )
    except RuntimeError as error:
        if place.parent is not None:  # the launcher knows better what became of rank 0
            raise
        where = (
            f"port {place.port} is not available on this machine"
            if serves
            else f"rank 0 does not answer at {place.address}:{place.port}"
        )
        raise XditError(f"{where} ({first_line(error)}); start rank 0, and see MASTER_ADDR and MASTER_PORT.") from error
    store = dist.PrefixStore("xdit", server)  # type: ignore[attr-defined]
    compare(store, digest, place, patience, observer)
    # A launcher ends a run that stands still; without one this does. A run that was stopped for a while is not to end
    # by it.
    wait = patience if place.parent is None else max(patience, timedelta(days=7))
    nccl = device == "cuda" and gpu_backend() != "gloo"
    if nccl and gpu_backend() in SHARING:  # NCCL takes ranks on one GPU for a mistake, unless their hosts differ
        os.environ.setdefault("NCCL_HOSTID", f"{host_name()}-rank{place.rank}")
    dist.init_process_group(
        backend="nccl" if nccl else "gloo",
        store=store,
        rank=place.rank,
        world_size=place.world,
        timeout=wait,
        device_id=torch.device("cuda", torch.cuda.current_device()) if nccl else None,
    )
    return store


@contextlib.contextmanager
def announced(text: str, quiet: bool = False) -> Iterator[None]:
    """Print on stderr what is waited for, if it takes long."""

    def say() -> None:
        print(text, file=sys.stderr, flush=True)

    timer = threading.Timer(SOON, say)
    timer.daemon = True
    if not quiet:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def first_line(error: BaseException) -> str:
    """Return the first line of an error of torch, without its stack."""
    return " ".join(str(error).split("\nException raised from")[0].split())[:200]


def everyones(store: Store, name: str, text: str, place: RankEnv) -> list[str]:
    """Return a text from each rank, by rank."""
    store.set(f"{name}/{place.rank}", text)
    return [store.get(f"{name}/{rank}").decode() for rank in range(place.world)]


def compare(store: Store, digest: str, place: RankEnv, patience: timedelta, observer: Observer) -> None:
    """Check that all ranks have the same plan, since others would wait for ever or compute something else.

    Raises:
        XditError: names the ranks that differ from rank 0, or that did not come.
    """
    keys = [f"digest/{rank}" for rank in range(place.world)]
    store.set(keys[place.rank], digest)
    end, told, before = time.monotonic() + patience.total_seconds(), False, list[int]()
    while absent := awaited(store, keys, min(LOOK, patience)):
        if absent != before:  # or it would look like progress
            observer.status(waiting_to_start(absent))
            before = absent
        text = f"{'ranks' if len(absent) > 1 else 'rank'} {join_words(absent)} of {place.world}"
        if time.monotonic() > end:
            raise XditError(
                f"{text} did not come within {patience.total_seconds():.0f} s; start all nodes, and see whether they "
                "reach this one."
            )
        if place.rank == 0 and not told and time.monotonic() > end - patience.total_seconds() + SOON:
            told = True
            print(f"waiting for {text} to start", file=sys.stderr, flush=True)
    digests = [store.get(key).decode() for key in keys]
    other = [rank for rank, value in enumerate(digests) if value != digests[0]]
    if other:
        raise XditError(
            f"{'ranks' if len(other) > 1 else 'rank'} {join_words(other)} of {place.world} got another plan than rank "
            "0; copy one plan.json to every node and start all ranks again."
        )


def awaited(store: Store, keys: Sequence[str], patience: timedelta) -> list[int]:
    """Wait a while for the keys of all ranks, and return the ranks that did not write theirs."""
    try:
        store.wait(list(keys), patience)
    except RuntimeError:
        return [rank for rank, key in enumerate(keys) if not store.check([key])]  # raises as well if rank 0 has gone
    return []
