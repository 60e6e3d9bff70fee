"""Hosts made of network namespaces of this machine, each with an sshd of its own: what crosses between them crosses a network."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

NAMES = ("alpha", "beta")


@dataclass
class Cluster:
    """Two hosts and the bridge to them; the launcher runs on this side.

    Args:
        folder: keys and configurations.
        prefix: of the names of interfaces and namespaces.
        subnet: the first three numbers of the addresses.
    """

    folder: Path
    prefix: str
    subnet: str

    @property
    def ssh(self) -> str:
        """The ssh command that knows the hosts by name."""
        return f"ssh -F {self.folder / 'config'}"

    def address(self, name: str) -> str:
        return f"{self.subnet}.{2 + NAMES.index(name)}"

    def inside(self, name: str) -> list[str]:
        """Words before a command that is to run on a host."""
        return ["ip", "netns", "exec", f"{self.prefix}{name}"]

    def link(self, name: str, state: str) -> None:
        """Pull the plug of a host, or put it back."""
        run("ip", "link", "set", f"{self.prefix}{name[0]}", state)

    def processes(self, name: str, part: str = "xdit") -> list[int]:
        """Processes of ours on a host."""
        found = []
        for pid in run("ip", "netns", "pids", f"{self.prefix}{name}").split():
            with contextlib.suppress(OSError):
                state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
                if part in Path(f"/proc/{pid}/cmdline").read_text() and state != "Z":
                    found.append(int(pid))
        return found

    def left(self, seconds: float = 10) -> list[int]:
        """Processes of ours that are still there after a while."""
        end = time.monotonic() + seconds
        while (found := [pid for name in NAMES for pid in self.processes(name)]) and time.monotonic() < end:
            time.sleep(0.1)
        return found


def run(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def missing() -> str:
    """Why there can be no hosts here, "" if there can."""
    if sys.platform != "linux" or os.geteuid():
        return "network namespaces need root on Linux"
    absent = [name for name in ("ip", "ssh", "ssh-keygen") if not shutil.which(name)]
    if not Path("/usr/sbin/sshd").exists():
        absent.append("sshd")
    return f"{', '.join(absent)} not installed (apt-get install iproute2 openssh-server)" if absent else ""


SSHD = """
ListenAddress {address}
HostKey {folder}/host
AuthorizedKeysFile {folder}/key.pub
PidFile none
StrictModes no
UsePAM no
PermitRootLogin yes
PasswordAuthentication no
MaxStartups 100
SetEnv PYTHONPATH={path} HF_HUB_OFFLINE=1
"""
CLIENT = """
Host {name}
  HostName {address}
  IdentityFile {folder}/key
  UserKnownHostsFile {folder}/known
  StrictHostKeyChecking accept-new
"""


@contextlib.contextmanager
def cluster(folder: Path, path: Sequence[Path]) -> Iterator[Cluster]:
    """Make the hosts, and take them away.

    Args:
        folder: an empty folder.
        path: what Python finds modules in there, beside what is installed.
    """
    number = os.getpid()
    made = Cluster(folder, f"x{number % 10**6:x}", f"10.{200 + number // 250 % 50}.{number % 250}")
    bridge, daemons = f"{made.prefix}br", []
    for key in ("host", "key"):
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key))
    Path("/run/sshd").mkdir(exist_ok=True)
    try:
        run("ip", "link", "add", bridge, "type", "bridge")
        run("ip", "address", "add", f"{made.subnet}.1/24", "dev", bridge)
        run("ip", "link", "set", bridge, "up")
        client = ""
        for name in NAMES:
            space, outer = f"{made.prefix}{name}", f"{made.prefix}{name[0]}"
            run("ip", "netns", "add", space)
            run("ip", "link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", space)
            run("ip", "link", "set", outer, "master", bridge, "up")
            inside = made.inside(name)
            run(*inside, "ip", "address", "add", f"{made.address(name)}/24", "dev", "eth0")
            run(*inside, "ip", "link", "set", "eth0", "up")
            run(*inside, "ip", "link", "set", "lo", "up")
            text = SSHD.format(
                address=made.address(name),
                folder=folder,
                path=os.pathsep.join([*map(str, path), *filter(None, [os.environ.get("PYTHONPATH")])]),
            )
            (folder / f"sshd-{name}").write_text(text)
            daemons.append(subprocess.Popen([*inside, "/usr/sbin/sshd", "-D", "-e", "-f", str(folder / f"sshd-{name}")],
                                            stdin=subprocess.DEVNULL, stderr=(folder / f"sshd-{name}.log").open("w")))  # fmt: skip
            client += CLIENT.format(name=name, address=made.address(name), folder=folder)
        (folder / "config").write_text(client)
        yield made
    finally:
        for daemon in daemons:
            daemon.kill()
            daemon.wait()
        for name in NAMES:
            subprocess.run(["ip", "link", "delete", f"{made.prefix}{name[0]}"], capture_output=True)
            subprocess.run(["ip", "netns", "delete", f"{made.prefix}{name}"], capture_output=True)
        subprocess.run(["ip", "link", "delete", bridge], capture_output=True)
