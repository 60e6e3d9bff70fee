"""Sockets of one machine: listen on a port, see whether a port answers, find the network interface to an address."""

from __future__ import annotations

import contextlib
import os
import socket

from xdit_core.errors import UsageError


def listen(address: str, port: int, backlog: int) -> socket.socket:
    """A socket on which rank 0 will be met.

    Args:
        address: of this machine, "" for all of its addresses.
        port: 0 for any free one.
        backlog: how many connections may wait.

    Raises:
        UsageError: another program has the port.
    """
    try:
        return socket.create_server((address, port), backlog=backlog)
    except OSError as error:
        raise UsageError(
            f"port {port} is not available on this machine ({os.strerror(error.errno or 0)}); choose another with "
            "--rdzv HOST:PORT."
        ) from error


def probe_port(address: str, port: int, seconds: float = 5.0) -> None:
    """Connect to a port and close the connection again.

    Raises:
        OSError: nobody answers there.
    """
    socket.create_connection((address, port), timeout=seconds).close()


def interface_to(address: str, port: int) -> str:
    """The name of the network interface that leads to an address, "" if none is known."""
    import psutil  # type: ignore[import-untyped]

    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, port or 9))  # sends nothing
        own_address = probe.getsockname()[0]
        if own_address.startswith("127."):
            return "lo"
        for name, addresses in psutil.net_if_addrs().items():
            if any(a.address == own_address for a in addresses):
                return str(name)
    return ""
