"""Hosts made of network namespaces of this machine: what crosses between them crosses a network, whose rate can be set.

Needs root on Linux and iproute2. For tests and benchmarks of what happens between machines.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

INTERFACE = "eth0"  # of every host
BURST = 1 << 17  # bytes, at least one large packet; of a fast link a millisecond's worth
QUEUE = "50ms"


def missing(*programs: str) -> str:
    """Why there can be no hosts here, "" if there can.

    Args:
        programs: that are needed beside ``ip``.
    """
    if sys.platform != "linux" or os.geteuid():
        return "network namespaces need root on Linux"
    where = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    absent = [name for name in ("ip", *programs) if not shutil.which(name, path=where)]
    if absent:
        return f"not installed: {', '.join(absent)} (apt-get install iproute2 openssh-server)"
    allowed = subprocess.run(["unshare", "--net", "--mount", "true"], capture_output=True).returncode == 0
    return (
        "" if allowed else "this machine does not let root make network namespaces (a container without CAP_SYS_ADMIN?)"
    )


def run(*words: str) -> str:
    """A command's output.

    Raises:
        RuntimeError: it failed; says how.
    """
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} failed: {done.stderr.strip()}")
    return done.stdout


@dataclass(frozen=True)
class Hosts:
    """Some hosts on a bridge that this side is on too.

    Args:
        names: of the hosts; the first letters differ.
        prefix: of the names of interfaces and namespaces.
        subnet: the first three numbers of the addresses; this side is number 1.
    """

    names: tuple[str, ...]
    prefix: str
    subnet: str

    def address(self, name: str) -> str:
        """IPv4 address of a host."""
        return f"{self.subnet}.{2 + self.names.index(name)}"

    def inside(self, name: str) -> list[str]:
        """Words before a command that is to run on a host."""
        return ["ip", "netns", "exec", f"{self.prefix}{name}"]

    def link(self, name: str, state: str) -> None:
        """Pull the plug of a host (``down``), or put it back (``up``)."""
        run("ip", "link", "set", f"{self.prefix}{name[0]}", state)

    def rate(self, bits: float) -> None:
        """Limit what every host sends, in bits a second."""
        burst = max(BURST, int(bits / 8 / 1000))
        for name in self.names:
            limit = ("rate", f"{int(bits)}bit", "burst", str(burst), "latency", QUEUE)
            run(*self.inside(name), "tc", "qdisc", "replace", "dev", INTERFACE, "root", "tbf", *limit)

    def pids(self, name: str) -> list[int]:
        """Processes on a host."""
        return [int(pid) for pid in run("ip", "netns", "pids", f"{self.prefix}{name}").split()]

    def add(self, name: str) -> None:
        """Make a host."""
        space, outer, inside = f"{self.prefix}{name}", f"{self.prefix}{name[0]}", self.inside(name)
        run("ip", "netns", "add", space)
        run("ip", "link", "add", outer, "type", "veth", "peer", "name", INTERFACE, "netns", space)
        run("ip", "link", "set", outer, "master", f"{self.prefix}br", "up")
        run(*inside, "ip", "address", "add", f"{self.address(name)}/24", "dev", INTERFACE)
        run(*inside, "ip", "link", "set", INTERFACE, "up")
        run(*inside, "ip", "link", "set", "lo", "up")


@contextlib.contextmanager
def hosts(names: Sequence[str]) -> Iterator[Hosts]:
    """Make hosts, and take them away.

    Raises:
        RuntimeError: it is not possible here.
    """
    number = os.getpid()
    made = Hosts(tuple(names), f"x{number % 10**6:x}", f"10.{200 + number // 250 % 50}.{number % 250}")
    bridge = f"{made.prefix}br"
    try:
        run("ip", "link", "add", bridge, "type", "bridge")
        run("ip", "address", "add", f"{made.subnet}.1/24", "dev", bridge)
        run("ip", "link", "set", bridge, "up")
        for name in names:
            made.add(name)
        yield made
    finally:
        for name in names:
            subprocess.run(["ip", "link", "delete", f"{made.prefix}{name[0]}"], capture_output=True)
            subprocess.run(["ip", "netns", "delete", f"{made.prefix}{name}"], capture_output=True)
        subprocess.run(["ip", "link", "delete", bridge], capture_output=True)


def sent_by(interface: str = INTERFACE) -> int:
    """Bytes that have left an interface of the host where this is called, headers included."""
    return int(Path(f"/sys/class/net/{interface}/statistics/tx_bytes").read_text())
