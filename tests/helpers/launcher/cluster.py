"""Two hosts, network namespaces of this machine, each with an sshd of its own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from xdit_core.testing import hosts as network
from xdit_core.testing.hosts import Hosts, run

NAMES = ("alpha", "beta")
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


@dataclass(frozen=True)
class Cluster:
    """The hosts; the launcher runs on this side of the bridge.

    Args:
        folder: keys and configurations.
    """

    folder: Path
    hosts: Hosts

    @property
    def disk(self) -> Path:
        """A disk of 64 KiB that all hosts see."""
        return self.folder / "disk"

    @property
    def own(self) -> Path:
        """A folder of which every host has its own."""
        return self.folder / "own"

    @property
    def ssh(self) -> str:
        """The ssh command that knows the hosts by name."""
        return f"ssh -F {self.folder / 'config'}"

    def processes(self, name: str, part: str = "xdit_") -> list[int]:
        """Processes on a host whose command has these letters, by default those of our modules."""
        found = []
        for pid in self.hosts.pids(name):
            with contextlib.suppress(OSError):
                state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
                if part in Path(f"/proc/{pid}/cmdline").read_text() and state != "Z":
                    found.append(pid)
        return found

    def left(self, seconds: float = 10) -> list[int]:
        """Processes of ours that are still there after a while."""
        end = time.monotonic() + seconds
        while (found := [pid for name in NAMES for pid in self.processes(name)]) and time.monotonic() < end:
            time.sleep(0.1)
        return found


def missing() -> str:
    """Why there can be no such hosts here, "" if there can."""
    return network.missing("ssh", "ssh-keygen", "sshd")


@contextlib.contextmanager
def cluster(folder: Path, path: Sequence[Path]) -> Iterator[Cluster]:
    """Make the hosts, and take them away.

    Args:
        folder: an empty folder.
        path: what Python finds modules in there, beside what is installed.
    """
    for key in ("host", "key"):
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key))
    Path("/run/sshd").mkdir(exist_ok=True)
    everything = os.pathsep.join([*map(str, path), *filter(None, [os.environ.get("PYTHONPATH")])])
    with network.hosts(NAMES) as hosts, contextlib.ExitStack() as stack:
        disk = folder / "disk"  # before the hosts have anything that runs: they see what is mounted then
        disk.mkdir()
        run("mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk))
        stack.callback(run, "umount", "-l", str(disk))
        (folder / "own").mkdir()
        client = ""
        for name in NAMES:
            config, log = folder / f"sshd-{name}", stack.enter_context((folder / f"sshd-{name}.log").open("w"))
            config.write_text(SSHD.format(address=hosts.address(name), folder=folder, path=everything))
            script = f"mount -t tmpfs tmpfs {folder}/own && exec /usr/sbin/sshd -D -e -f {config}"
            command = [*hosts.inside(name), "unshare", "-m", "sh", "-c", script]
            daemon = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=log)
            stack.callback(daemon.wait)
            stack.callback(daemon.kill)
            client += CLIENT.format(name=name, address=hosts.address(name), folder=folder)
        (folder / "config").write_text(client)
        yield Cluster(folder, hosts)
