"""The backend ``local``: every rank is a process of this machine, or of this and others on which it is started by hand.

Plain supervision rather than ``elastic_launch``, which costs 2 s before the first worker starts, blocks where hangs must be
noticed, and leaves the workers running when it is killed itself.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import click

from xdit_core import machine
from xdit_core.beat import beat_path, read_beat
from xdit_core.errors import UsageError
from xdit_core.records import Traffic
from xdit_launcher import report

if TYPE_CHECKING:
    from xdit_core.plan import Plan

INTERRUPTED = 130
HOST = "127.0.0.1"
GRACE = 1.0  # seconds that a worker has to end by itself
CAUSE = 2.0  # seconds in which the cause of a lost connection should show itself

Workers = dict[int, "subprocess.Popen[bytes]"]  # by rank


def start(plan: Plan, folder: Path, options: Mapping[str, str]) -> int:
    """Run a plan on this machine.

    Args:
        plan: what to run.
        folder: an existing folder for the plan, the logs and the beats.
        options: ``nnodes``, ``node_rank`` and ``rdzv`` if it is one of several machines, see `Node.of`.

    Returns:
        0, the exit code of the rank to blame, or 130 after Ctrl-C and SIGTERM.

    Raises:
        UsageError: the machine has too few GPUs, or the nodes cannot share the ranks.
    """
    node = Node.of(options)
    ranks = node.ranks(plan.world)
    gpus = machine.cuda_devices()
    if plan.run.device == "cuda" and len(ranks) > gpus:
        raise UsageError(f"{len(ranks)} processes but {gpus} GPUs on this machine; lower the degrees, or use device=cpu.")
    for line in spanning(plan, len(ranks)):
        say(line)
    (folder / "plan.json").write_text(plan.to_json(), encoding="utf-8")
    workers: Workers = {}
    try:
        with sigterm_interrupts():
            spawn(plan, folder, node, workers)
            codes, stuck = watch(plan, folder, workers)
    except KeyboardInterrupt:
        stop(workers)
        say("interrupted; every process has ended.")
        return INTERRUPTED
    except BaseException:
        stop(workers)
        raise
    if not any(codes) and stuck is None:
        return 0
    stop(workers)
    found = report.blame(folder, codes, stuck, alone=node.count == 1)
    say("\n".join(report.lines(found, plan.world, folder)))
    return found.code


@dataclass(frozen=True)
class Node:
    """This machine among those of a run.

    Args:
        index, count: which of how many.
        address, port: where rank 0 is met; with one node, a free port of this machine.
    """

    index: int = 0
    count: int = 1
    address: str = HOST
    port: int = 0

    @staticmethod
    def of(options: Mapping[str, str]) -> Node:
        """From ``nnodes``, ``node_rank`` and ``rdzv`` (``HOST:PORT`` of node 0), which are the same on all nodes but for ``node_rank``.

        Raises:
            UsageError: one is missing, unknown or out of range.
        """
        if not options:
            return Node()
        unknown = sorted(set(options) - {"nnodes", "node_rank", "rdzv"})
        if unknown:
            raise UsageError(f"the backend local has no option {', '.join(unknown)}; leave it out.")
        example = "--nnodes 2 --node-rank 0 --rdzv 10.0.0.1:29500"
        if len(options) < 3:
            raise UsageError(f"--nnodes, --node-rank and --rdzv go together; write for example {example}.")
        address, _, port = options["rdzv"].rpartition(":")
        try:
            index, count, number = int(options["node_rank"]), int(options["nnodes"]), int(port)
        except ValueError as error:
            raise UsageError(
                f"--rdzv is HOST:PORT and the other two are numbers ({error}); write for example {example}."
            ) from error
        if not address or not 0 < number < 65536 or not 0 <= index < count:
            raise UsageError(
                f"--node-rank counts from 0 to nnodes - 1, --rdzv is HOST:PORT of node 0; write for example {example}."
            )
        return Node(index, count, address, number)

    def ranks(self, world: int) -> range:
        """The ranks that run here: neighbours, since those talk most.

        Raises:
            UsageError: the nodes cannot have equally many.
        """
        if world % self.count:
            raise UsageError(
                f"{world} processes cannot be shared evenly by {self.count} nodes; change the degrees, or set nproc to a multiple of {self.count}."
            )
        each = world // self.count
        return range(self.index * each, (self.index + 1) * each)

    @contextlib.contextmanager
    def server(self, backlog: int) -> Iterator[socket.socket | None]:
        """Where rank 0 will be met; it inherits the socket, so that nobody can take the port. None on the other nodes.

        Raises:
            UsageError: somebody has the port.
        """
        if self.index:
            yield None
            return
        try:
            server = socket.create_server((HOST if self.count == 1 else "", self.port), backlog=backlog)
        except OSError as error:
            raise UsageError(
                f"port {self.port} cannot be had here ({error.strerror}); choose another with --rdzv HOST:PORT."
            ) from error
        with server:
            yield server


def spanning(plan: Plan, each: int) -> Iterator[str]:
    """Warnings about axes whose ranks talk at every layer and sit on several nodes of ``each`` processes."""
    inside = 1
    for axis in reversed(plan.axes):
        inside *= axis.degree or 1
        if axis.traffic >= Traffic.PER_LAYER and (axis.degree or 1) > 1 and inside > each:
            yield (
                f"warning: {axis.name} {axis.degree} spans nodes of {each} processes, and its ranks talk at every layer; keep what talks so often to "
                f"{each} in all and let stages, cfg or dp span the nodes."
            )


def say(text: str) -> None:
    """On stderr, in place of a progress line that may stand there."""
    click.echo(("\r\x1b[K" if sys.stderr.isatty() else "") + text, err=True)


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """SIGTERM acts as Ctrl-C."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def spawn(plan: Plan, folder: Path, node: Node, workers: Workers) -> None:
    """Start one process a rank; each is added to ``workers`` at once, so that none is forgotten if this is interrupted."""
    ranks = node.ranks(plan.world)
    with node.server(2 * plan.world) as server:
        port = server.getsockname()[1] if server else node.port
        terminal = (os.dup(1), os.dup(2))
        try:
            for rank in ranks:
                env = environment(plan, rank, ranks, node.address, port)
                kept: tuple[int, ...] = ()
                if rank == 0 and server:
                    kept = (server.fileno(), *terminal)
                    env |= {"XDIT_LISTEN": str(server.fileno()), "XDIT_SCREEN": ",".join(map(str, terminal))}
                with (folder / f"rank{rank}.log").open("wb") as log:
                    workers[rank] = subprocess.Popen(
                        [sys.executable, "-m", "xdit_core.worker", str(folder / "plan.json")],
                        env=env,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        pass_fds=kept,
                        start_new_session=True,  # Ctrl-C comes to the launcher alone, and children end with their rank
                    )
        finally:
            for fd in terminal:
                os.close(fd)


def environment(plan: Plan, rank: int, ranks: range, address: str, port: int) -> dict[str, str]:
    """What ``xdit_core.worker`` reads; ``ranks`` are those of this machine."""
    threads = plan.run.threads or max(1, machine.cores() // len(ranks))
    env = {k: v for k, v in os.environ.items() if not k.startswith("TORCHELASTIC_")}
    if sys.platform == "linux" and (name := interface_to(address, port)):
        env.setdefault("GLOO_SOCKET_IFNAME", name)  # the host's name may lead nowhere
    env.setdefault("PYTHONSAFEPATH", "1")  # a random.py in this folder is not the standard library's
    return {
        **env,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank - ranks.start),
        "WORLD_SIZE": str(plan.world),
        "LOCAL_WORLD_SIZE": str(len(ranks)),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": str(threads),
        "XDIT_PARENT": str(os.getpid()),
    }


def interface_to(address: str, port: int) -> str:
    """The network interface that leads to an address, "" if none is known."""
    import psutil

    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, port or 9))  # sends nothing
        mine = probe.getsockname()[0]
        if mine.startswith("127."):
            return "lo"
        return next((name for name, found in psutil.net_if_addrs().items() if any(a.address == mine for a in found)), "")
    return ""


def exit_codes(plan: Plan, workers: Workers) -> list[int | None]:
    """By rank, None for one that runs; ranks of other nodes count as done."""
    return [workers[rank].poll() if rank in workers else 0 for rank in range(plan.world)]


def watch(plan: Plan, folder: Path, workers: Workers) -> tuple[list[int | None], float | None]:
    """Wait until all ranks of this machine are done, one has failed, or none moves any more.

    Returns:
        The exit codes, and in the last case the seconds waited.
    """
    counts: list[int] = []
    moved = looked = time.monotonic()
    while True:
        codes = exit_codes(plan, workers)
        if any(codes):
            wait_for_cause(plan, folder, workers)
            return exit_codes(plan, workers), None
        if all(code == 0 for code in codes):
            return codes, None
        time.sleep(0.03)
        now = time.monotonic()
        if now - looked > min(1.0, plan.run.timeout / 4):
            looked = now
            pulses = [read_beat(beat_path(folder, rank)) for rank in workers]
            fresh = [p.count if p else 0 for p in pulses]
            if fresh != counts:
                counts, moved = fresh, now
            elif now - moved > plan.run.timeout:
                ask_for_stacks(workers)
                return codes, plan.run.timeout


def wait_for_cause(plan: Plan, folder: Path, workers: Workers) -> None:
    """A rank that only lost its peer may be seen first; give the one that caused it a moment."""
    end = time.monotonic() + CAUSE
    while time.monotonic() < end and not report.decided(folder, exit_codes(plan, workers)):
        time.sleep(0.03)


def ask_for_stacks(workers: Workers) -> None:
    """Every rank writes the stack of its threads into its log."""
    for w in workers.values():
        if w.poll() is None:
            w.send_signal(signal.SIGUSR1)
    time.sleep(0.3)


def stop(workers: Workers) -> None:
    """End every worker and what it started; returns when none is left. Not to be interrupted: it takes a second at most."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, 10.0)):
            for w in workers.values():
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(w.pid, number)
            end = time.monotonic() + patience
            for w in workers.values():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    w.wait(max(0.0, end - time.monotonic()))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
