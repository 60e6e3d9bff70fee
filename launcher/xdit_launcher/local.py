"""The backend ``local``: every rank is a process of this machine.

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
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import click

from xdit_core import machine
from xdit_core.beat import beat_path, read_beat
from xdit_core.errors import UsageError
from xdit_launcher import report

if TYPE_CHECKING:
    from xdit_core.plan import Plan

INTERRUPTED = 130
HOST = "127.0.0.1"
GRACE = 1.0  # seconds that a worker has to end by itself
CAUSE = 2.0  # seconds in which the cause of a lost connection should show itself

Workers = list["subprocess.Popen[bytes]"]


def start(plan: Plan, folder: Path, options: Mapping[str, str]) -> int:
    """Run a plan on this machine.

    Args:
        plan: what to run.
        folder: an existing folder for the plan, the logs and the beats.
        options: none are known.

    Returns:
        0, the exit code of the rank to blame, or 130 after Ctrl-C and SIGTERM.

    Raises:
        UsageError: the machine has too few GPUs.
    """
    if options:
        raise UsageError(f"the backend local has no option {', '.join(options)}; leave it out.")
    gpus = machine.cuda_devices()
    if plan.run.device == "cuda" and plan.world > gpus:
        raise UsageError(f"{plan.world} processes but {gpus} GPUs on this machine; lower the degrees, or use device=cpu.")
    (folder / "plan.json").write_text(plan.to_json(), encoding="utf-8")
    workers: Workers = []
    try:
        with sigterm_interrupts():
            spawn(plan, folder, workers)
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
    found = report.blame(folder, codes, stuck)
    say("\n".join(report.lines(found, plan.world, folder)))
    return found.code


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


def spawn(plan: Plan, folder: Path, workers: Workers) -> None:
    """Start one process a rank; each is added to ``workers`` at once, so that none is forgotten if this is interrupted."""
    with socket.create_server((HOST, 0), backlog=2 * plan.world) as server:  # rank 0 inherits it: the port stays ours
        terminal = (os.dup(1), os.dup(2))
        try:
            for rank in range(plan.world):
                env = environment(plan, rank, server.getsockname()[1])
                kept: tuple[int, ...] = ()
                if rank == 0:
                    kept = (server.fileno(), *terminal)
                    env |= {"XDIT_LISTEN": str(server.fileno()), "XDIT_SCREEN": ",".join(map(str, terminal))}
                with (folder / f"rank{rank}.log").open("wb") as log:
                    workers.append(
                        subprocess.Popen(
                            [sys.executable, "-m", "xdit_core.worker", str(folder / "plan.json")],
                            env=env,
                            stdin=subprocess.DEVNULL,
                            stdout=log,
                            stderr=subprocess.STDOUT,
                            pass_fds=kept,
                            start_new_session=True,  # Ctrl-C comes to the launcher alone, and children end with their rank
                        )
                    )
        finally:
            for fd in terminal:
                os.close(fd)


def environment(plan: Plan, rank: int, port: int) -> dict[str, str]:
    """What ``xdit_core.worker`` reads."""
    threads = plan.run.threads or max(1, machine.cores() // plan.world)
    env = {k: v for k, v in os.environ.items() if not k.startswith("TORCHELASTIC_")}
    if sys.platform == "linux":
        env.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host's name may lead nowhere
    env.setdefault("PYTHONSAFEPATH", "1")  # a random.py in this folder is not the standard library's
    return {
        **env,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(plan.world),
        "LOCAL_WORLD_SIZE": str(plan.world),
        "MASTER_ADDR": HOST,
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": str(threads),
        "XDIT_PARENT": str(os.getpid()),
    }


def watch(plan: Plan, folder: Path, workers: Workers) -> tuple[list[int | None], float | None]:
    """Wait until all ranks are done, one has failed, or none moves any more.

    Returns:
        The exit codes, and in the last case the seconds waited.
    """
    counts: list[int] = []
    moved = looked = time.monotonic()
    while True:
        codes = [w.poll() for w in workers]
        if any(codes):
            wait_for_cause(folder, workers)
            return [w.poll() for w in workers], None
        if all(code == 0 for code in codes):
            return codes, None
        time.sleep(0.03)
        now = time.monotonic()
        if now - looked > min(1.0, plan.run.timeout / 4):
            looked = now
            pulses = [read_beat(beat_path(folder, rank)) for rank in range(plan.world)]
            fresh = [p.count if p else 0 for p in pulses]
            if fresh != counts:
                counts, moved = fresh, now
            elif now - moved > plan.run.timeout:
                ask_for_stacks(workers)
                return codes, plan.run.timeout


def wait_for_cause(folder: Path, workers: Workers) -> None:
    """A rank that only lost its peer may be seen first; give the one that caused it a moment."""
    end = time.monotonic() + CAUSE
    while time.monotonic() < end and not report.decided(folder, [w.poll() for w in workers]):
        time.sleep(0.03)


def ask_for_stacks(workers: Workers) -> None:
    """Every rank writes the stack of its threads into its log."""
    for w in workers:
        if w.poll() is None:
            w.send_signal(signal.SIGUSR1)
    time.sleep(0.3)


def stop(workers: Workers) -> None:
    """End every worker and what it started; returns when none is left. Not to be interrupted: it takes a second at most."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, 10.0)):
            for w in workers:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(w.pid, number)
            end = time.monotonic() + patience
            for w in workers:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    w.wait(max(0.0, end - time.monotonic()))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
