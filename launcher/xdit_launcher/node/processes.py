"""The ranks of one machine as processes: start them, look at them, end them.

Plain supervision rather than ``elastic_launch``, which costs 2 s before the first worker starts, blocks where hangs
must be noticed, and leaves the workers running when it is killed itself.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xdit_core import machine
from xdit_core.errors import UsageError
from xdit_core.observe.status import STARTING
from xdit_core.records import join_words
from xdit_core.worker.control import VARIABLE, ControlLink, control_pair
from xdit_core.worker.heartbeat import Heartbeat, heartbeat_path, read_heartbeat
from xdit_launcher.node.root_cause import RankStatus, read_error
from xdit_launcher.node.signals import without_interrupts
from xdit_launcher.node.sockets import interface_to

FLIGHT_PATIENCE = 3.0  # seconds; NCCL looks at its pipe once a second
LOG_END = 65536  # bytes
NCCL_WORDS = ("ProcessGroupNCCL", "NCCL communicator", "NCCL error", "ncclRemoteError", "ncclSystemError")
GRACE = 1.0  # seconds that a worker has to end by itself after SIGTERM
LOOK_INTERVAL = 0.25  # seconds between two reads of the heartbeats

Workers = dict[int, "subprocess.Popen[bytes]"]  # by rank
Controls = dict[int, ControlLink]  # by rank


@dataclass(frozen=True)
class NodeShare:
    """One machine's share of a run.

    Args:
        folder: the run folder, which holds plan.json.
        ranks: those of all ``world`` ranks that run here.
        threads: CPU threads of each rank, None to divide the cores among them.
        address, port: where rank 0 is met.
        host: the name of this machine in reports.
        env: further environment variables.
        devices: numbers of the GPUs to use; none given means all of them.
        sharing: how many shares of equal size are on this machine.
    """

    folder: Path
    ranks: range
    world: int
    address: str
    port: int
    threads: int | None = None
    host: str = field(default_factory=socket.gethostname)
    env: Mapping[str, str] = field(default_factory=dict)
    devices: tuple[int, ...] = ()
    sharing: int = 1

    def check(self, device: str | None) -> None:
        """Make sure that each rank has a GPU, if the ranks compute on GPUs.

        Raises:
            UsageError: there are too few.
        """
        gpus = machine.cuda_devices()
        if device == "cpu" or not (gpus or device == "cuda"):
            return
        if missing := [number for number in self.devices if number >= gpus]:
            raise UsageError(
                f"there is no GPU {join_words(missing)} on {self.host}, which has {gpus}, counted from 0; leave it out."
            )
        count, usable = len(self.ranks), len(self.devices) or gpus
        shared = machine.gpu_backend({**os.environ, **self.env}) in machine.SHARING and usable > 0
        if count > usable and not shared:
            raise UsageError(
                f"{count} processes need {count} GPUs and {self.host} has {usable}; lower the degrees, use device=cpu, "
                "or let ranks share a GPU with XDIT_BACKEND=gloo in the environment."
            )

    def environment(self, rank: int) -> dict[str, str]:
        """The environment of a rank, which `xdit_core.worker.entry` reads."""
        together = len(self.ranks) * self.sharing
        threads = self.threads or machine.threads(together)
        env = {k: v for k, v in os.environ.items() if not k.startswith("TORCHELASTIC_")} | dict(self.env)
        name = interface_to(self.address, self.port) if sys.platform == "linux" else ""
        if name == "lo" and self.address == "localhost":  # as a Kubernetes operator may call the first pod to itself
            name = ""
        if (
            name and env.get("GLOO_SOCKET_IFNAME", "lo") == "lo"
        ):  # which leads to no other machine; nor may the host's own name
            env["GLOO_SOCKET_IFNAME"] = name
        env.setdefault("PYTHONSAFEPATH", "1")  # a random.py in this folder is not the standard library's
        if self.devices:
            visible = [name for name in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
            env["CUDA_VISIBLE_DEVICES"] = ",".join(visible[d] if visible else str(d) for d in self.devices)
        return {
            **env,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank - self.ranks.start),
            "WORLD_SIZE": str(self.world),
            "LOCAL_WORLD_SIZE": str(together),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
            "OMP_NUM_THREADS": str(threads),
            "XDIT_PARENT": str(os.getpid()),
            machine.HOST_VARIABLE: self.host,
        }


def spawn(
    share: NodeShare,
    workers: Workers,
    server: socket.socket | None,
    screen: Sequence[int],
    controls: Controls | None = None,
) -> None:
    """Start one process for each rank; each is added to ``workers`` at once, so that an interruption forgets none.

    Args:
        share: which ranks, and how.
        workers: takes the processes.
        server: the socket on which rank 0 is met, on the machine that has it. Rank 0 inherits it, so that no other
            program can take the port.
        screen: file descriptors for what rank 0 prints.
        controls: takes the control connections of ranks that answer requests; None if they draw what the plan says.
    """
    for rank in share.ranks:
        env = share.environment(rank)
        inherited: tuple[int, ...] = ()
        if rank == 0 and server is not None:
            inherited = (server.fileno(), *screen)
            env |= {"XDIT_LISTEN": str(server.fileno()), "XDIT_SCREEN": ",".join(map(str, screen))}
        with contextlib.ExitStack() as stack:
            log = stack.enter_context(log_path(share.folder, rank).open("wb"))
            if controls is not None:
                controls[rank], end = control_pair()
                stack.callback(end.close)
                inherited = (*inherited, end.fileno())
                env[VARIABLE] = str(end.fileno())
            workers[rank] = subprocess.Popen(
                [sys.executable, "-m", "xdit_core.worker", str(share.folder / "plan.json")],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=inherited,
                start_new_session=True,  # Ctrl-C comes to the launcher alone, and children end with their rank
            )


def log_path(folder: Path, rank: int) -> Path:
    """The file that takes what a rank prints."""
    return folder / f"rank{rank}.log"


class LocalRanks:
    """The ranks of this machine, known by their processes and files.

    Args:
        host: its name in reports.
        controls: the control connections of ranks that answer requests.
    """

    def __init__(self, folder: Path, workers: Workers, host: str, controls: Controls | None = None) -> None:
        self.folder, self.workers, self.host = folder, workers, host
        self.controls: Controls = {} if controls is None else controls
        self._last_look, self._statuses = 0.0, dict[int, RankStatus]()
        self._wakes, self._wake = socket.socketpair()
        self._wakes.setblocking(False)

    def wake(self) -> None:
        """Let `messages` return at once; may be called from any thread."""
        with contextlib.suppress(OSError):
            self._wake.send(b"!")

    def close(self) -> None:
        """Close the control connections."""
        for control in self.controls.values():
            control.close()
        self._wakes.close()
        self._wake.close()

    def messages(self, seconds: float) -> list[tuple[int, dict[str, Any]]]:
        """Messages of ranks, each with the rank; wait so many seconds if there is none."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._wakes, selectors.EVENT_READ)
            for rank, control in self.controls.items():
                if not control.closed:
                    selector.register(control, selectors.EVENT_READ, rank)
            selector.select(seconds)
        with contextlib.suppress(BlockingIOError):
            self._wakes.recv(4096)
        messages = []
        for rank, control in self.controls.items():
            while (message := control.waiting()) is not None:
                messages.append((rank, message))
        return messages

    def look(self) -> Mapping[int, RankStatus]:
        """What is known of each rank now; takes some milliseconds."""
        time.sleep(0.03)
        return self.statuses()

    def statuses(self) -> Mapping[int, RankStatus]:
        """What is known of each rank now; files are read now and then only."""
        codes = {rank: w.poll() for rank, w in self.workers.items()}
        changed = codes != {rank: status.code for rank, status in self._statuses.items()}
        if changed or any(codes.values()) or time.monotonic() - self._last_look > LOOK_INTERVAL:
            self._last_look = time.monotonic()
            self._statuses = {rank: self._read(rank, code) for rank, code in codes.items()}
        return self._statuses

    def last(self) -> Mapping[int, RankStatus]:
        """What the files say of each rank, now that the processes have ended."""
        return {rank: self._read(rank, w.poll()) for rank, w in self.workers.items()}

    def _read(self, rank: int, code: int | None) -> RankStatus:
        beat, log = read_heartbeat(heartbeat_path(self.folder, rank)), log_path(self.folder, rank)
        error = read_error(self.folder, rank) if code != 0 else None
        if error is None and code == -signal.SIGABRT:
            error = aborted_by_nccl(rank, self.host, beat, log)
        return RankStatus(self.host, code, beat, error, log=str(log))


def aborted_by_nccl(rank: int, host: str, beat: Heartbeat | None, log: Path) -> dict[str, Any] | None:
    """The error of a rank that the watchdog of NCCL aborted, which it does where a peer has gone; it is a victim.

    Args:
        beat: its last heartbeat.
        log: its log, whose end says what aborted it.

    Returns:
        What a rank writes itself where it can, see `xdit_core.worker.failure`; None if it was not NCCL.
    """
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - LOG_END))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return None
    said = next((line for line in lines if any(word in line for word in NCCL_WORDS)), None)
    if said is None:
        return None
    return {
        "rank": rank,
        "host": host,
        "status": (beat.status if beat else STARTING).to_dict(),
        "type": "DistBackendError",
        "message": f"NCCL aborted the rank: {said.strip()[:300]}",
        "known": False,
        "victim": True,
        "exit_code": 128 + signal.SIGABRT,
        "monotonic": beat.at if beat else time.monotonic(),
        "wall": time.time(),
        "traceback": "",
    }


def ask_for_stacks(workers: Workers, folder: Path | None = None) -> None:
    """Let every rank write the stacks of its threads into its log, and NCCL what it had issued into the run folder."""
    dumps = ask_for_flights(folder, workers) if folder is not None else 0
    for w in workers.values():
        if w.poll() is None:
            w.send_signal(signal.SIGUSR1)
    time.sleep(FLIGHT_PATIENCE if dumps else 0.3)


def ask_for_flights(folder: Path, ranks: Iterable[int]) -> int:
    """Ask the flight recorder of NCCL for a dump through the pipe on which it listens; how many ranks have one."""
    asked = 0
    for rank in ranks:
        with contextlib.suppress(OSError):  # no such pipe, or nobody reads it
            pipe = os.open(folder / f"nccl-rank{rank}.pipe", os.O_WRONLY | os.O_NONBLOCK)
            try:
                os.write(pipe, b"1\n")
            finally:
                os.close(pipe)
            asked += 1
    return asked


def stop(workers: Workers) -> None:
    """End every worker and all that it started, and return when none is left.

    It cannot be interrupted, and takes a second in most cases.
    """
    with without_interrupts():
        for number, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, 10.0)):
            signal_all(workers, number)
            resume(workers)  # a process that is stopped takes no other signal
            end = time.monotonic() + patience
            for w in workers.values():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    w.wait(max(0.0, end - time.monotonic()))


def pause(workers: Workers) -> None:
    """Stop every worker and all that it started, until `resume`.

    SIGTSTP would not do, since nothing continues a session that has no terminal.
    """
    signal_all(workers, signal.SIGSTOP)


def resume(workers: Workers) -> None:
    """Let every worker go on after `pause`."""
    signal_all(workers, signal.SIGCONT)


def signal_all(workers: Workers, number: int) -> None:
    """Send a signal to every worker and all that it started."""
    for pid in pids(workers.values()):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, number)


def pids(workers: Iterable[subprocess.Popen[bytes]]) -> list[int]:
    """Process ids of the workers, each the leader of a process group of its own."""
    return [w.pid for w in workers]
