"""The backend ``ssh``: log in to every host and start an agent there.

The remote command is always the same; what to do travels as JSON on its stdin, so nothing needs quoting, and the end of
stdin ends it.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from xdit_core.errors import UsageError
from xdit_core.filesystem import user_path
from xdit_launcher.backends.supervise import supervise
from xdit_launcher.cluster import hosts as machines
from xdit_launcher.cluster.connection import PipeConnection
from xdit_launcher.cluster.fleet import Fleet
from xdit_launcher.cluster.host_file import filtered, parse_hosts, read_hostfile
from xdit_launcher.cluster.hosts import Host
from xdit_launcher.cluster.run import StartedOnHosts, started_on

if TYPE_CHECKING:
    from xdit_core.plan import Plan

# BatchMode: a question for a password would never be answered; ServerAlive: a connection that is dead is noticed
OPTIONS = (
    "-o",
    "BatchMode=yes",
    "-o",
    "ConnectTimeout=10",
    "-o",
    "ServerAliveInterval=5",
    "-o",
    "ServerAliveCountMax=2",
    "-T",
)


@dataclass(frozen=True)
class Settings:
    """Which hosts, and how to get there."""

    hosts: str = field(default="", metadata={"help": "hosts with their slots: a:8,b:8"})
    hostfile: str = field(default="", metadata={"help": "a file with lines such as: host slots=8"})
    include: str = field(default="", metadata={"help": "only these hosts and devices: a@b:0,2"})
    exclude: str = field(default="", metadata={"help": "all but these hosts and devices"})
    rdzv: str = field(
        default="", metadata={"help": "[HOST:]PORT at which the ranks meet; any free port of the first host"}
    )
    env: str = field(default="NCCL_*,GLOO_*", metadata={"help": "variables to pass on, by name"})
    python: str = field(default="", metadata={"help": "interpreter on the hosts; default: the path of this one"})
    command: str = field(
        default="ssh", metadata={"help": "the ssh command with options of its own, such as ssh -p 2222"}
    )


def hosts_of(settings: Settings) -> list[Host]:
    """The hosts that remain after the filters.

    Raises:
        UsageError: none are named, or they cannot be read.
    """
    if bool(settings.hosts) == bool(settings.hostfile):
        raise UsageError("give the hosts with either --hosts a:8,b:8 or --hostfile FILE.")
    if settings.hosts:
        hosts = parse_hosts(settings.hosts)
    else:
        hosts = read_hostfile(user_path(settings.hostfile, "--hostfile "))
    return filtered(hosts, settings.include, settings.exclude)


def devices(settings: Settings) -> int:
    """How many processes suit the hosts."""
    return machines.devices(hosts_of(settings))


def remote_command(host: Host, settings: Settings) -> str:
    """The shell command that starts the agent on a host."""
    return f"{shlex.quote(host.python or settings.python or sys.executable)} -P -m xdit_launcher.node.agent"


def command_to(host: Host, settings: Settings) -> list[str]:
    """The ssh command for a host.

    Raises:
        UsageError: ``ssh.command`` is empty or not closed.
    """
    try:
        ssh = shlex.split(settings.command)
    except ValueError as error:
        raise UsageError(
            f"ssh.command={settings.command} cannot be read ({error}); write for example ssh -p 2222."
        ) from error
    if not ssh:
        raise UsageError("ssh.command= is empty; write for example ssh -p 2222, or leave it out.")
    return [*ssh, *OPTIONS, "--", host.name, remote_command(host, settings)]


def show(plan: Plan, settings: Settings, words: Sequence[str]) -> list[str]:
    """Lines for a dry run."""
    return [shlex.join(command_to(host, settings)) for host in hosts_of(settings)]


def connect(settings: Settings) -> Fleet:
    """Agents on all hosts."""
    hosts = hosts_of(settings)
    return Fleet(
        hosts,
        lambda i, deliver: PipeConnection(command_to(hosts[i], settings), i, hosts[i].name, deliver, explain),
        typed=True,
    )


def start(plan: Plan, folder: Path, settings: Settings) -> int:
    """Run a plan on the hosts."""
    return supervise(plan, ranks(plan, folder, settings))


def ranks(
    plan: Plan, folder: Path, settings: Settings, serving: bool = False
) -> AbstractContextManager[StartedOnHosts]:
    """Start the ranks of a plan on the hosts; see `xdit_launcher.cluster.run.started_on`."""
    return started_on(partial(connect, settings), plan, folder, settings, serving)


def explain(code: int, last_lines: Sequence[str], host: str, heard: bool) -> str:
    """A sentence about an agent that ended.

    Args:
        code: exit code of ssh.
        last_lines: what ssh and the agent printed last.
        host: name of the host.
        heard: the agent had said something before.
    """
    text = " ".join(last_lines)
    last = last_lines[-1].rstrip(".") if last_lines else f"exit code {code}"
    if heard:
        reason = "the connection ended" if code == 255 else f"its agent ended with exit code {code}"
        return f"{reason}{f' ({last})' if last_lines else ''}; see whether the host is up, and what ended the agent"
    for part, fix in (
        ("Could not resolve hostname", "write it as ssh knows it, or add it to /etc/hosts or ~/.ssh/config"),
        (
            "Permission denied",
            "make a key that this user may log in with (ssh-copy-id), since nobody can type a password here",
        ),
        ("Host key verification failed", f"log in once by hand to accept its key: ssh {host}"),
        ("Connection refused", "start sshd there, or give its port: ssh.command='ssh -p 2222'"),
        ("timed out", "see whether the host is up and reachable"),
        ("No route to host", "see whether the host is up and reachable"),
        ("No module named", "install xdit for the interpreter there, or name another one with ssh.python=PATH"),
        ("Unknown option: -P", "use Python 3.11 or newer there, see ssh.python="),
        ("not found", "name the interpreter there with ssh.python=PATH, or python=PATH in the hostfile"),
        ("No such file", "name the interpreter there with ssh.python=PATH, or python=PATH in the hostfile"),
    ):
        if part in text:
            return f"{next((line for line in last_lines if part in line), last).rstrip('.')}; {fix}."
    return f"{last}; try by hand: ssh {host}"
