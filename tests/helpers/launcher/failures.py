"""What breaks, on two hosts that are network namespaces, and what the launcher must say of it.

``python tests/helpers/launcher/failures.py --write`` writes ``docs/use/failures.md``, with torchrun and accelerate
beside; it takes a quarter of an hour.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import pty
import re
import signal
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

from helpers.launcher import FAULTY
from helpers.launcher.cluster import Cluster, cluster
from xdit_core.testing.beats import step_of

HERE = Path(__file__).parent
DOC = HERE.parents[2] / "docs" / "use" / "failures.md"
LONG = ("steps=4000", "timeout=300")
BEGIN, END = "<!-- table: python tests/helpers/launcher/failures.py --write -->", "<!-- end of the table -->"


@dataclass
class Job:
    """A launcher that runs.

    Args:
        process: the launcher.
        folder: where it works.
        master: the terminal that it has, if any.
    """

    process: subprocess.Popen[bytes]
    folder: Path
    made: Cluster
    master: int | None = None

    def until_steps(self) -> None:
        """Wait until both ranks draw."""
        end = time.monotonic() + 90
        while time.monotonic() < end and self.process.poll() is None:
            beats = [*self.folder.glob("runs/*/rank?.beat")]
            if len(beats) == 2 and all(map(step_of, beats)):
                return
            time.sleep(0.1)
        raise AssertionError(f"no steps: {(self.folder / 'err').read_text()}")


Act = Callable[[Job], None]


@dataclass(frozen=True)
class Case:
    """Something that breaks.

    Args:
        name: in words, as in the table.
        words: further words of the command line.
        act: what is done once both ranks draw.
        code: the exit code.
        who: the beginning of the report, "" if it is no report of a rank.
        parts: what must be said.
        setup: something around the run; gives further words.
        how: the same failure in a plain script, for other launchers.
    """

    name: str
    words: tuple[str, ...] = ()
    act: Act | None = None
    code: int = 1
    who: str = "rank 1 of 2 on beta failed at: "
    parts: tuple[str, ...] = ()
    setup: Callable[[Cluster, Path], contextlib.AbstractContextManager[tuple[str, ...]]] | None = None
    how: str = ""


@dataclass
class Outcome:
    """What came of a case.

    Args:
        seconds: from the failure to the end of the launcher.
        lines: of the report.
        left: processes on the hosts 10 s later.
    """

    code: int
    seconds: float
    text: str
    lines: list[str] = field(default_factory=list)
    left: list[int] = field(default_factory=list)


def faulty(how: str, **more: object) -> tuple[str, ...]:
    return (f"faulty.how={how}", "faulty.rank=1", "faulty.step=5", *(f"{k}={v}" for k, v in more.items()))


def agent_killed(job: Job) -> None:
    (pid,) = [
        p
        for p in job.made.processes("beta", "xdit_launcher.node.agent")
        if "sh" not in Path(f"/proc/{p}/comm").read_text()
    ]
    os.kill(pid, signal.SIGKILL)


def link_down(job: Job) -> None:
    job.made.hosts.link("beta", "down")


def send(*signals: int) -> Act:
    def act(job: Job) -> None:
        for number in signals:
            with contextlib.suppress(ProcessLookupError):
                job.process.send_signal(number)
            time.sleep(0.2)

    return act


def terminal_closed(job: Job) -> None:
    assert job.master is not None
    os.close(job.master)


@contextlib.contextmanager
def port_taken(made: Cluster, folder: Path) -> Iterator[tuple[str, ...]]:
    code = "import socket, time; s = socket.create_server(('', 29517)); print(flush=True); time.sleep(600)"
    with subprocess.Popen([*made.hosts.inside("alpha"), sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        yield ("--rdzv", "29517")
        process.kill()


@contextlib.contextmanager
def full_disk(made: Cluster, folder: Path) -> Iterator[tuple[str, ...]]:
    filler = made.disk / "filler"  # names find room beside it, but not what they hold
    filler.write_bytes(bytes(1 << 16))
    try:
        yield (f"out={made.disk}/x.png",)
    finally:
        filler.unlink()


@contextlib.contextmanager
def other_version(made: Cluster, folder: Path) -> Iterator[tuple[str, ...]]:
    info = folder / "other" / "diffusers-0.41.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: diffusers\nVersion: 0.41.0\n")
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={folder}/other:$PYTHONPATH exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    (folder / "hosts").write_text(f"alpha slots=1\nbeta slots=1 python={python}\n")
    yield ("--hostfile", "hosts")


@contextlib.contextmanager
def unknown_host(made: Cluster, folder: Path) -> Iterator[tuple[str, ...]]:
    yield ("--hosts", "alpha,nowhere.invalid")


@contextlib.contextmanager
def second_job(made: Cluster, folder: Path) -> Iterator[tuple[str, ...]]:
    other = folder / "other"
    other.mkdir()
    job = start(made, other, ("steps=3",))
    yield ()
    assert job.process.wait(60) == 0, (other / "err").read_text()


CASES = (
    Case("a worker raises an error", faulty("raise"), parts=("ValueError: a number that is no number",), how="raise"),
    Case("a worker leaves with exit code 3", faulty("exit"), code=3, parts=("left with exit code 3",), how="exit"),
    Case("a worker is killed (SIGKILL)", faulty("kill"), code=137, parts=("killed by signal 9 (SIGKILL)",), how="kill"),
    Case(
        "a worker runs out of memory", faulty("limit"), code=137, parts=("out of memory (", "lower height"), how="limit"
    ),
    Case(
        "a worker hangs in its own work", faulty("hang", steps=9), parts=("no rank made progress for 20 s",), how="hang"
    ),
    Case(
        "a worker hangs in a collective",
        faulty("collective", steps=9),
        parts=("no rank made progress for 20 s",),
        how="collective",
    ),
    Case(
        "a host loses its network",
        LONG,
        link_down,
        parts=("it was lost with its host: no word from it for",),
        how="link",
    ),
    Case("the agent of a host is killed", LONG, agent_killed, parts=("it was lost with its host: ",), how="agent"),
    Case(
        "Ctrl-C, twice",
        LONG,
        send(signal.SIGINT, signal.SIGINT),
        130,
        "",
        ("interrupted; every process has ended.",),
        how="SIGINT",
    ),
    Case("SIGTERM to the launcher", LONG, send(signal.SIGTERM), 130, "", ("interrupted; every process has ended.",)),
    Case("SIGKILL to the launcher", LONG, send(signal.SIGKILL), -9, "", how="SIGKILL"),
    Case("its terminal is closed", LONG, terminal_closed, 130, ""),
    Case(
        "another version on a host",
        code=2,
        who="",
        parts=("beta has diffusers 0.41.0, and this machine",),
        setup=other_version,
    ),
    Case(
        "the port is taken",
        code=2,
        who="",
        parts=("alpha: port 29517 is not available on this machine (Address already in use)",),
        setup=port_taken,
    ),
    Case(
        "the disk is full at output",
        ("steps=3",),
        None,
        1,
        "rank 0 of 2 on alpha failed at: writing ",
        ("x.png cannot be written: No space left on device; the result is in", "failed at: writing /", "with out=."),
        full_disk,
    ),
    Case("a second run on the same hosts", ("steps=3",), code=0, who="", setup=second_job),
    Case(
        "a host has no address",
        code=2,
        who="",
        parts=("nowhere.invalid: ", "Could not resolve hostname"),
        setup=unknown_host,
    ),
)


def start(made: Cluster, folder: Path, words: Sequence[str], terminal: bool = False) -> Job:
    """The launcher as a user starts it, over both hosts."""
    hosts = () if {"--hosts", "--hostfile"} & set(words) else ("--hosts", "alpha:1,beta:1")
    command = [sys.executable, "-P", "-m", "xdit_launcher.cli", *hosts, "--on", "ssh", f"ssh.command={made.ssh}",
               "--plugins", "usp,faulty",
               "usp.ulysses=2", "model=emoji", "threads=1", *words, "red heart"]  # fmt: skip
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(FAULTY), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep),
    }
    if not any(w.startswith("faulty.") for w in words):
        command[command.index("usp,faulty")] = "usp"
    master = None
    with (folder / "out").open("wb") as out, (folder / "err").open("wb") as err:
        more = {"stdin": subprocess.DEVNULL, "start_new_session": True}
        if terminal:
            master, slave = pty.openpty()

            def take() -> None:
                fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
                signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as a shell leaves it, even if the tests run under nohup

            more = {"stdin": slave, "start_new_session": True, "preexec_fn": take}
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=out, stderr=err, **more)  # type: ignore[call-overload]
        if terminal:
            os.close(slave)
    return Job(process, folder, made, master)


def attempt(made: Cluster, case: Case, folder: Path) -> Outcome:
    """Run a case."""
    with case.setup(made, folder) if case.setup else contextlib.nullcontext(()) as words:
        began = time.time()
        job = start(made, folder, (*words, *case.words), terminal=case.act is terminal_closed)
        try:
            if case.act:
                job.until_steps()
                began = time.time()
                case.act(job)
            code = job.process.wait(90)
            ended = time.time()
            mark = folder / "fault-time"
            failed = float(mark.read_text()) if mark.exists() else began
            text = (folder / "err").read_text()
            lines = text.splitlines()
            first = next((i for i, line in enumerate(lines) if case.who and line.startswith(case.who)), None)
            report = (
                lines[first:]
                if first is not None
                else [line for line in lines if any(part in line for part in case.parts)]
            )
            return Outcome(code, ended - failed, text, report, made.left(10))
        finally:
            if job.process.poll() is None:
                job.process.kill()
                job.process.wait()
            made.hosts.link("beta", "up")


OTHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--master-port", "29533",
                 "--node-rank"],
    "accelerate": ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "2", "--num_processes", "2",
                   "--main_process_port", "29533", "--machine_rank"],
}  # fmt: skip
WATCHED = 60.0  # seconds that another launcher is given


def beside(made: Cluster, tool: str, how: str, folder: Path) -> str:
    """What another launcher makes of a failure on the second host, read on the first; in words for the table."""
    for name in ("fault-time", "reached0"):
        (folder / name).unlink(missing_ok=True)
    where = "--master-addr" if tool == "torchrun" else "--main_process_ip"
    plain = how if how in ("raise", "exit", "kill", "limit", "hang", "collective") else "none"
    launchers = []
    for number, host in enumerate(("alpha", "beta")):
        command = [
            *made.hosts.inside(host),
            sys.executable,
            *OTHERS[tool],
            str(number),
            where,
            made.hosts.address("alpha"),
            str(HERE / "plain.py"),
            plain,
        ]
        env = {**os.environ, "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
        err = (folder / f"{host}.err").open("wb")
        launchers.append(
            subprocess.Popen(command, cwd=folder, env=env, stdout=err, stderr=err, stdin=subprocess.DEVNULL)
        )
    first, second = launchers
    try:
        mark = folder / ("reached0" if plain == "none" else "fault-time")
        end = time.monotonic() + 60
        while not mark.exists():
            if time.monotonic() > end:
                return "did not start"
            time.sleep(0.05)
        failed = time.time()
        if how == "link":
            made.hosts.link("beta", "down")
        elif how == "agent":
            second.kill()
        elif how in ("SIGINT", "SIGKILL"):
            first.send_signal(getattr(signal, how))
        elif plain != "none":
            failed = float(mark.read_text())
        try:
            code = first.wait(WATCHED)
        except subprocess.TimeoutExpired:
            return f"nothing within {WATCHED:.0f} s"
        seconds = time.time() - failed
        text = (folder / "alpha.err").read_text(errors="replace")
        root = re.search(r"Root Cause.*?rank\s*:\s*(\d+)", text, re.S)
        named = f"names rank {root[1]}" if root else "names no rank"
        end = time.monotonic() + 10
        while (
            left := [p for name in ("alpha", "beta") for p in made.processes(name, "plain.py")]
        ) and time.monotonic() < end:
            time.sleep(0.2)
        stay = f", {len(left)} processes stay" if left else ""
        return f"{seconds:.0f} s, {named}, {len(text.splitlines())} lines, exit code {code}{stay}"
    finally:
        made.hosts.link("beta", "up")
        for launcher in launchers:
            launcher.kill()
            launcher.wait()
        for name in ("alpha", "beta"):
            for pid in made.processes(name, "plain.py"):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def row(case: Case, outcome: Outcome, others: Sequence[str]) -> str:
    """A line of the table."""
    said = " ".join(" ".join(outcome.lines[:2]).split()) or (
        "(nothing: both runs draw their picture)" if outcome.code == 0 else "(nothing: nobody can see it)"
    )
    said = re.sub(r"/\S*/(?=[^/\s]+)", "", said)
    cells = [case.name, f"{outcome.seconds:.1f} s", str(outcome.code), said.replace("|", "\\|")[:260], *others]
    return f"| {' | '.join(cells)} |"


def write(only: str) -> None:
    before, _, rest = DOC.read_text().partition(BEGIN)
    known = {line.split("|")[1].strip(): line for line in rest.partition(END)[0].splitlines() if line.startswith("| ")}
    rows = []
    with tempfile.TemporaryDirectory() as root, cluster(Path(root), [FAULTY]) as made:
        for i, case in enumerate(CASES):
            if only not in case.name and case.name in known:
                rows.append(known[case.name])
                continue
            folder = Path(root) / f"case{i}"
            folder.mkdir()
            outcome = attempt(made, case, folder)
            others = [beside(made, tool, case.how, folder) if case.how else "" for tool in OTHERS]
            rows.append(row(case, outcome, others))
            print(rows[-1], f"left: {outcome.left}" if outcome.left else "", flush=True)
    head = ["what breaks", "until the launcher has ended", "exit code", "what it says", "torchrun", "accelerate"]
    table = [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *rows]
    DOC.write_text(before + "\n".join([BEGIN, "", *table, "", END]) + rest.partition(END)[2])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write docs/use/failures.md")
    parser.add_argument("--only", default="", help="part of a name; these cases alone")
    args = parser.parse_args()
    if args.write:
        write(args.only)
    else:
        with tempfile.TemporaryDirectory() as root, cluster(Path(root), [FAULTY]) as made:
            for i, case in enumerate(c for c in CASES if args.only in c.name):
                folder = Path(root) / f"case{i}"
                folder.mkdir()
                print(case.name, attempt(made, case, folder), flush=True)
