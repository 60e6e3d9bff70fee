"""The backend ``local``: every rank is a process of this machine, or of this and others on which it is started by
hand."""

from __future__ import annotations

import contextlib
import os
import shlex
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xdit_core import machine
from xdit_core.errors import UsageError
from xdit_core.filesystem import write_text
from xdit_core.outputs import results
from xdit_core.records import join_words
from xdit_core.worker.rendezvous import not_started
from xdit_launcher.backends.base import StartedRanks
from xdit_launcher.backends.supervise import supervise
from xdit_launcher.cluster import placement
from xdit_launcher.cluster.connection import PipeConnection
from xdit_launcher.cluster.fleet import Fleet
from xdit_launcher.cluster.hosts import Host
from xdit_launcher.node import processes, root_cause, sockets
from xdit_launcher.node.processes import Controls, LocalRanks, NodeShare, Workers
from xdit_launcher.node.root_cause import RankStatuses, RootCause
from xdit_launcher.node.signals import Suspension
from xdit_launcher.node.watching import CAUSE_PATIENCE
from xdit_launcher.printing import say

if TYPE_CHECKING:
    from xdit_core.plan import Plan

HOST = "127.0.0.1"
EXAMPLE = "--nnodes 2 --node-rank 0 --rdzv 10.0.0.1:29500"


@dataclass(frozen=True)
class Settings:
    """Which machine this is among several, on each of which the user starts the same command; none for one machine."""

    nnodes: int | None = field(default=None, metadata={"help": "machines of the run"})
    node_rank: int | None = field(default=None, metadata={"help": "which of them this is, from 0"})
    rdzv: str | None = field(
        default=None, metadata={"help": "HOST:PORT: an address of machine 0, and a free port there"}
    )
    devices: str = field(default="", metadata={"help": "numbers of the GPUs to use, such as 0,1; default: all"})
    sharing: int = field(default=1, metadata={"help": "runs of this size on this machine, which divide its cores"})


def devices(settings: Settings) -> int | None:
    """How many processes suit all machines, None for as many as suit this one."""
    each = len(numbers(settings)) or machine.cuda_devices() or machine.cores()
    if settings.devices and not settings.nnodes:
        return each
    return settings.nnodes * each if settings.nnodes and settings.nnodes > 1 else None


def check(plan: Plan, settings: Settings) -> None:
    """Refuse what can be known before anything is written.

    Raises:
        UsageError: the machine has too few GPUs, the nodes cannot share the ranks, or the results cannot be written
            here.
    """
    node = Node.of(settings)
    ranks = node.ranks(plan.world)
    if settings.sharing < 1:
        raise UsageError(f"local.sharing={settings.sharing} is too small; give 1 or more.")
    NodeShare(Path(), ranks, plan.world, node.address, node.port, devices=numbers(settings)).check(plan.device)
    if any(plan.owns(rank) for rank in ranks):
        results.check_writable(plan)


def numbers(settings: Settings) -> tuple[int, ...]:
    """The GPUs to use; none given means all.

    Raises:
        UsageError: they are no numbers.
    """
    parts = [part.strip() for part in settings.devices.split(",")] if settings.devices else []
    if not all(part.isdecimal() and len(part) < 5 for part in parts) or len(set(parts)) < len(parts):
        raise UsageError(f"local.devices={settings.devices} is not a list of GPUs; write numbers such as 0,1.")
    return tuple(int(part) for part in parts)


def beside(plan: Plan, settings: Settings, number: int, count: int) -> Settings:
    """The settings for one of several gangs on this machine: each has GPUs of its own, or its part of the cores.

    Raises:
        UsageError: there are too few GPUs, or the ranks are on several machines.
    """
    if settings.nnodes:
        raise UsageError("gangs beside each other are on one machine with --on local; leave out --nnodes.")
    settings = replace(settings, sharing=settings.sharing * count)
    gpus = numbers(settings) or tuple(range(machine.cuda_devices()))
    if plan.device == "cpu" or not gpus:
        return settings
    if count * plan.world > len(gpus):
        raise UsageError(
            f"{count} gangs of {plan.world} ranks need {count * plan.world} GPUs and there are {len(gpus)}; lower "
            "--replicas or the degrees."
        )
    own = gpus[number * plan.world : (number + 1) * plan.world]
    return replace(settings, devices=",".join(map(str, own)))


def start(plan: Plan, folder: Path, settings: Settings) -> int:
    """Run a plan on this machine; `check` has let it through.

    Args:
        plan: what to run.
        folder: an existing folder for the plan, the logs and the heartbeats.
        settings: which of several machines this is.

    Returns:
        0, the exit code of the rank that is the cause of a failure, or 130 after Ctrl-C and SIGTERM.

    Raises:
        UsageError: the port is taken.
    """
    return supervise(plan, ranks(plan, folder, settings))


@contextlib.contextmanager
def ranks(plan: Plan, folder: Path, settings: Settings, serving: bool = False) -> Iterator[StartedHere]:
    """Start the ranks of this machine, which end with the context.

    Args:
        plan, folder, settings: as of `start`.
        serving: they answer requests instead of drawing what the plan says.

    Raises:
        UsageError: the port is taken; or the ranks are to answer requests and some are on other machines.
    """
    node = Node.of(settings)
    if serving and node.count > 1:
        raise UsageError(
            "ranks that answer requests are started from one machine, and --nnodes means that each machine starts its "
            "own; name the machines instead: --hosts a,b."
        )
    for line in placement.warnings(plan, [Node(k, node.count).ranks(plan.world) for k in range(node.count)]):
        say(line)
    write_text(folder / "plan.json", plan.to_json(), "runs")
    started = StartedHere(plan, folder, node, serving, numbers(settings), settings.sharing)
    try:
        with started.suspension.installed():
            started.start()
            yield started
    finally:
        started.close()


class StartedHere(StartedRanks):
    """The ranks of this machine, each a child process.

    Args:
        plan, folder: what they run, and their run folder.
        node: this machine among those of the run.
        serving: they answer requests.
        gpus: numbers of the GPUs to use; none given means all of them.
        sharing: how many runs of this size are on this machine.
    """

    cause_patience = CAUSE_PATIENCE

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        node: Node,
        serving: bool = False,
        gpus: tuple[int, ...] = (),
        sharing: int = 1,
    ) -> None:
        self._gpus, self._sharing = gpus, sharing
        self.plan, self.folder, self.node, self.elsewhere = plan, folder, node, node.count > 1
        self._workers: Workers = {}
        self._controls: Controls | None = {} if serving else None
        self._local = LocalRanks(folder, self._workers, socket.gethostname(), self._controls)
        self.suspension = Suspension(lambda: processes.pause(self._workers), lambda: processes.resume(self._workers))

    def start(self) -> None:
        """Start them.

        Raises:
            UsageError: the port is taken.
        """
        plan, node = self.plan, self.node
        with node.server(2 * plan.world) as server, duplicates(1, 2) as screen:
            port = server.getsockname()[1] if server else node.port
            ranks, threads = node.ranks(plan.world), plan.run.threads
            share = NodeShare(
                self.folder,
                ranks,
                plan.world,
                node.address,
                port,
                threads,
                devices=self._gpus,
                sharing=self._sharing,
            )
            processes.spawn(share, self._workers, server, screen, self._controls)

    def look(self) -> RankStatuses:
        """What is known of each rank; a Ctrl-Z of the user takes effect here."""
        self.suspension.settle()
        return self._local.look()

    def statuses(self) -> RankStatuses:
        """What is known of each rank."""
        ended = all(worker.poll() is not None for worker in self._workers.values())
        return self._local.last() if ended else self._local.statuses()

    def absent(self, statuses: RankStatuses) -> str:
        """A sentence about nodes that have not joined."""
        return self.node.absent(statuses, self.plan.world) if self.elsewhere else ""

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message to every rank."""
        for control in (self._controls or {}).values():
            control.send(message)

    def messages(self, seconds: float) -> list[tuple[int, dict[str, Any]]]:
        """Messages of the ranks."""
        return self._local.messages(seconds)

    def wake(self) -> None:
        """Let `messages` return at once."""
        self._local.wake()

    def ask_for_stacks(self) -> None:
        """Let every rank write the stacks of its threads into its log."""
        processes.ask_for_stacks(self._workers, self.folder)

    def report(self, cause: RootCause) -> list[str]:
        """Lines about the cause of a failure."""
        return root_cause.report_lines(cause, self.plan.world)

    def stop(self) -> str:
        """End every process."""
        processes.stop(self._workers)
        return "every process has ended"

    def finish(self) -> None:
        """Nothing is left to do: the ranks print into the terminal themselves."""

    def close(self) -> None:
        """End whatever still runs, and close the control connections."""
        if any(worker.poll() is None for worker in self._workers.values()):
            self.stop()
        self._local.close()


def connect(settings: Settings) -> Fleet:
    """An agent on this machine."""
    name = socket.gethostname()
    command = [sys.executable, "-P", "-m", "xdit_launcher.node.agent"]
    return Fleet(
        [Host(name)],
        lambda i, deliver: PipeConnection(
            command, i, name, deliver, lambda code, last_lines, *_: " ".join(last_lines) or f"exit code {code}"
        ),
    )


@contextlib.contextmanager
def duplicates(*fds: int) -> Iterator[tuple[int, ...]]:
    """Copies of file descriptors, for child processes to inherit; they are closed after the block."""
    copies = tuple(os.dup(fd) for fd in fds)
    try:
        yield copies
    finally:
        for fd in copies:
            os.close(fd)


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
    def of(settings: Settings) -> Node:
        """From the settings, which are the same on all nodes but for ``node_rank``.

        Raises:
            UsageError: one is missing or out of range.
        """
        count, index, rdzv = settings.nnodes, settings.node_rank, settings.rdzv
        if count is None and index is None and rdzv is None:
            return Node()
        if count is None or index is None or rdzv is None:
            raise UsageError(f"--nnodes, --node-rank and --rdzv go together; write for example {EXAMPLE}.")
        if not 0 <= index < count:
            raise UsageError(f"--node-rank counts from 0 to nnodes - 1; write for example {EXAMPLE}.")
        address, port = parse_address(rdzv)
        return Node(index, count, address, port)

    def ranks(self, world: int) -> range:
        """The ranks of this node: neighbours, since those exchange most.

        Raises:
            UsageError: the nodes cannot have equally many.
        """
        if world % self.count:
            raise UsageError(
                f"{world} processes cannot be divided evenly among {self.count} nodes; change the degrees, or set "
                f"nproc to a multiple of {self.count}."
            )
        each = world // self.count
        return range(self.index * each, (self.index + 1) * each)

    def absent(self, statuses: RankStatuses, world: int) -> str:
        """A sentence about the nodes that have not joined.

        It is "" if all have joined, or if ranks of this node are not ready themselves.
        """
        waits = [not_started(s.status) for s in statuses.values()]
        ranks = {rank for ranks in waits for rank in ranks} - set(statuses)
        nodes = [k for k in range(self.count) if k != self.index and ranks & set(Node(k, self.count).ranks(world))]
        if not nodes or not all(waits):
            return ""
        if 0 in nodes and self.index:  # while rank 0 is missing, nothing is known of the others
            nodes = [0]
        which = f"node {nodes[0]} has" if len(nodes) == 1 else f"nodes {join_words(nodes)} have"
        each = "it with: " if len(nodes) == 1 else "each with its own --node-rank, such as: "
        return f"{which} not come to {self.address}:{self.port}; start {each}{command_for(nodes[0], sys.argv[1:])}"

    @contextlib.contextmanager
    def server(self, backlog: int) -> Iterator[socket.socket | None]:
        """The socket on which rank 0 will be met, None on the other nodes.

        Raises:
            UsageError: another program has the port.
        """
        if self.index:
            yield None
            return
        with sockets.listen(HOST if self.count == 1 else "", self.port, backlog) as server:
            yield server


def command_for(index: int, words: Sequence[str]) -> str:
    """The command to start on another node, made from the words of the command here."""
    changed, number = list(words), str(index)
    for i, word in enumerate(words):
        if word == "--node-rank" and i + 1 < len(words):
            changed[i + 1] = number
        for start in ("--node-rank=", "local.node_rank="):
            if word.startswith(start):
                changed[i] = start + number
    if changed == list(words):  # the setting is in a config file, or this was not started from a command line
        return f"the same command and --node-rank {index}"
    return shlex.join(["xdit-launch", *changed])


def parse_address(rdzv: str) -> tuple[str, int]:
    """``HOST:PORT``.

    Raises:
        UsageError: it is something else.
    """
    address, _, port = rdzv.rpartition(":")
    if not address or not port.isdecimal() or len(port) > 5 or not 0 < int(port) < 65536:
        raise UsageError(
            f"--rdzv {rdzv} is not HOST:PORT; write an address of machine 0 and a free port, such as 10.0.0.1:29500."
        )
    return address.strip("[]"), int(port)
