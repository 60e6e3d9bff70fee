"""The backend ``slurm``: inside an allocation (``salloc``, ``sbatch``) start one agent on each node with ``srun``;
outside, submit a batch job that does it.

A batch job runs ``python -m xdit_launcher.backends.slurm FOLDER`` with the plan that was made when it was submitted.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from xdit_core.errors import UsageError, XditError
from xdit_core.filesystem import atomically
from xdit_core.printable import printable
from xdit_core.settings import build
from xdit_launcher.backends.supervise import supervise
from xdit_launcher.cluster import host_facts, hosts
from xdit_launcher.cluster.connection import PipeConnection
from xdit_launcher.cluster.fleet import Fleet
from xdit_launcher.cluster.hosts import Host
from xdit_launcher.cluster.run import StartedOnHosts, started_on
from xdit_launcher.node.signals import INTERRUPTED, ignore_interrupts, signals_interrupt
from xdit_launcher.printing import say
from xdit_launcher.run_folders import QUEUED, note_end, queued

if TYPE_CHECKING:
    from xdit_core.plan import Plan

SETTINGS = "slurm.json"  # in the run folder of a batch job


@dataclass(frozen=True)
class Settings:
    """What to ask Slurm for; inside an allocation all of its nodes are used unless ``nnodes`` is less."""

    nnodes: int | None = field(default=None, metadata={"help": "nodes of the run"})
    options: str = field(
        default="", metadata={"help": "further options of sbatch, such as --partition=gpu --gpus-per-node=8"}
    )
    rdzv: str = field(
        default="", metadata={"help": "[HOST:]PORT at which the ranks meet; any free port of the first node"}
    )
    env: str = field(
        default="", metadata={"help": "variables to pass on, by name; Slurm itself passes the environment"}
    )
    wait: bool = field(
        default=False, metadata={"help": "outside an allocation: return when the job is done, with its exit code"}
    )


def devices(settings: Settings) -> int | None:
    """How many processes suit the nodes; outside an allocation, as many on each as suit this machine."""
    nodes = node_count(settings)
    counts = [os.environ.get(name, "") for name in ("SLURM_GPUS_ON_NODE", "SLURM_CPUS_ON_NODE")]
    each = next((int(text) for text in counts if text.isdecimal()), 0)
    return nodes * each if each else hosts.devices([Host("")] * nodes)


def node_count(settings: Settings) -> int:
    """The number of nodes of the run.

    Raises:
        UsageError: more than the allocation has.
    """
    allocated = int(os.environ.get("SLURM_JOB_NUM_NODES", "0"))
    if settings.nnodes is not None and (settings.nnodes < 1 or (allocated and settings.nnodes > allocated)):
        raise UsageError(
            f"--nnodes {settings.nnodes} but the allocation has {allocated or 'no'} nodes; give 1 to "
            f"{allocated or 'as many as you need'}."
        )
    return settings.nnodes or allocated or 1


def node_names(environ: Mapping[str, str], count: int) -> list[str]:
    """The names of the first nodes of the allocation.

    Raises:
        UsageError: Slurm does not name them.
    """
    try:
        listing = subprocess.run(
            ["scontrol", "show", "hostnames", environ["SLURM_JOB_NODELIST"]],
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        )
    except (OSError, KeyError, subprocess.SubprocessError) as error:
        raise UsageError(
            f"scontrol does not name the nodes of job {environ.get('SLURM_JOB_ID')} ({error}); run this on a node of "
            "the allocation."
        ) from error
    return listing.stdout.split()[:count]


def srun(node: str) -> list[str]:
    """The command that starts an agent on a node.

    Each node has a step of its own, because the outputs of several tasks of one step get mixed within lines.
    """
    step = [
        "srun",
        "--nodes=1",
        "--ntasks=1",
        f"--nodelist={node}",
        "--overlap",
        "--kill-on-bad-exit=1",
        "--cpu-bind=none",
        "--unbuffered",
    ]
    return [*step, sys.executable, "-P", "-m", "xdit_launcher.node.agent"]


def script(folder: str, settings: Settings) -> list[str]:
    """The lines of the script of the batch job."""
    log = f"{folder}/slurm.out"
    wanted = [
        f"--nodes={settings.nnodes or 1}",
        "--ntasks-per-node=1",
        "--job-name=xdit",
        f"--output={log}",
        *options_of(settings),
    ]
    command = [sys.executable, "-P", "-m", "xdit_launcher.backends.slurm", folder]
    return ["#!/bin/bash", *(f"#SBATCH {shlex.quote(word)}" for word in wanted), f"exec {shlex.join(command)}"]


def options_of(settings: Settings) -> list[str]:
    """The user's options of sbatch.

    Raises:
        UsageError: they cannot stand in the lines of a script.
    """
    if printable(settings.options) != settings.options:
        raise UsageError(
            f"slurm.options={settings.options} holds control characters; write the options in one line, such as "
            "--partition=gpu."
        )
    try:
        return shlex.split(settings.options)
    except ValueError as error:
        raise UsageError(
            f"slurm.options={settings.options} cannot be read ({error}); write for example --partition=gpu."
        ) from error


def show(plan: Plan, settings: Settings, words: Sequence[str]) -> list[str]:
    """Lines for a dry run."""
    if "SLURM_JOB_ID" in os.environ:
        return [shlex.join(srun(node)) for node in node_names(os.environ, node_count(settings))]
    return ["sbatch with this script:", *script(f"{Path(plan.run.runs).absolute()}/FOLDER", settings)]


def explain(code: int, last_lines: Sequence[str], host: str, heard: bool) -> str:
    """A sentence about a step that ended, see `xdit_launcher.cluster.connection.Explain`."""
    last_line = last_lines[-1] if last_lines else f"exit code {code}"
    reason = next((line for line in last_lines if "error" in line), last_line).rstrip(".")
    if heard:
        return f"its agent ended ({reason}); see whether the node is up: sinfo -N"
    return f"{reason}; see the state of the nodes with sinfo -N"


def check(plan: Plan, settings: Settings) -> None:
    """Refuse what can be known before anything is written.

    Raises:
        UsageError: the options cannot be read, or the plan is for CPUs only because this machine has no GPU.
    """
    options_of(settings)
    if "SLURM_JOB_ID" not in os.environ and (
        problem := host_facts.device_problem(plan, True, "the nodes may have some")
    ):
        raise UsageError(problem)


def start(plan: Plan, folder: Path, settings: Settings) -> int:
    """Run a plan on the nodes of this allocation, or submit it as a batch job."""
    if "SLURM_JOB_ID" not in os.environ:
        with queued(folder, ends=settings.wait):
            return submit(plan, folder, settings)
    return supervise(plan, ranks(plan, folder, settings))


def ranks(
    plan: Plan, folder: Path, settings: Settings, serving: bool = False
) -> AbstractContextManager[StartedOnHosts]:
    """Start the ranks of a plan on the nodes of this allocation; see `xdit_launcher.cluster.run.started_on`."""
    return started_on(partial(connect, settings), plan, folder, settings, serving)


def connect(settings: Settings) -> Fleet:
    """Agents on the nodes of this allocation.

    Raises:
        UsageError: there is none.
    """
    if "SLURM_JOB_ID" not in os.environ:
        raise UsageError("this is not inside a Slurm allocation; get one first: salloc --nodes=2.")
    names = node_names(os.environ, node_count(settings))
    return Fleet(
        [Host(name) for name in names],
        lambda i, deliver: PipeConnection(srun(names[i]), i, names[i], deliver, explain),
    )


def submit(plan: Plan, folder: Path, settings: Settings) -> int:
    """Submit a plan as a batch job, and say where its output goes.

    Raises:
        UsageError: there is no Slurm here, or it refuses the job.
    """
    for name, text in (("plan.json", plan.to_json()), (SETTINGS, json.dumps(dataclasses.asdict(settings)))):
        with atomically(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    try:
        sbatch = subprocess.Popen(
            ["sbatch", "--parsable", *(["--wait"] if settings.wait else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C comes to the launcher alone
        )
    except OSError as error:
        raise UsageError(
            f"sbatch cannot be started ({error.strerror}); run this on a machine of the cluster."
        ) from error
    assert sbatch.stdin and sbatch.stdout and sbatch.stderr
    sbatch.stdin.write("\n".join(script(str(folder), settings)) + "\n")
    sbatch.stdin.close()
    number = sbatch.stdout.readline().strip().split(";")[0]
    if not number:
        reason = " ".join(sbatch.stderr.read().split()).removeprefix("sbatch: error: ")
        raise UsageError(
            f"Slurm refuses the job: {reason}; see what it has with sinfo, and change slurm.options= or --nnodes."
        )
    try:
        with signals_interrupt():  # before the number is printed: the user may interrupt as soon as it is there
            say(f"batch job {number}; its output: {folder / 'slurm.out'}; to end it: scancel {number}")
            return sbatch.wait()
    except KeyboardInterrupt:
        ignore_interrupts()
        subprocess.run(["scancel", number], capture_output=True)
        (folder / QUEUED).unlink(missing_ok=True)
        say(f"interrupted; batch job {number} is cancelled.")
        return INTERRUPTED


def main(folder: Path) -> int:
    """Run the plan of a batch job inside its allocation."""
    from xdit_core.plan import Plan

    plan = Plan.from_json((folder / "plan.json").read_text(encoding="utf-8"))
    settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    try:
        return start(plan, folder, build(Settings, "", settings))
    except XditError as error:
        say(str(error))
        return error.exit_code
    finally:
        note_end(folder)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
