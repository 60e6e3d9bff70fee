"""The control connection of a rank: lines of JSON over a socket pair to whoever started it. Without torch."""

from __future__ import annotations

import json
import selectors
import socket
import threading
from collections import deque
from collections.abc import Mapping
from typing import Any

VARIABLE = "XDIT_CONTROL"  # file descriptor of a rank's end of the connection
CHUNK = 2**20  # bytes read at once


class ControlLink:
    """One end of a control connection.

    Args:
        end: a connected socket; the link owns it.
    """

    def __init__(self, end: socket.socket) -> None:
        self._socket, self._lock = end, threading.Lock()
        self._buffer = bytearray()
        self._messages: deque[dict[str, Any]] = deque()
        self._selector = selectors.DefaultSelector()
        self._selector.register(end, selectors.EVENT_READ)
        self.closed = False

    def fileno(self) -> int:
        """The file descriptor, for a selector."""
        return self._socket.fileno()

    def send(self, message: Mapping[str, Any]) -> bool:
        """Send a message as a line.

        Returns:
            Whether the other end still listens.
        """
        data = json.dumps(message).encode() + b"\n"
        try:
            with self._lock:
                self._socket.sendall(data)
        except OSError:
            return False
        return True

    def receive(self, seconds: float | None = None) -> dict[str, Any] | None:
        """Return the next message, and wait for one if there is none yet.

        Args:
            seconds: how long to wait; None: as long as the other end is there.

        Returns:
            None if nothing came in time, or if the other end has gone (``closed``).
        """
        while not self._messages and not self.closed:
            if not self._selector.select(seconds):
                break
            self._read()
        return self._messages.popleft() if self._messages else None

    def waiting(self) -> dict[str, Any] | None:
        """Return the next message if it is here already."""
        return self.receive(0.0)

    def _read(self) -> None:
        try:
            data = self._socket.recv(CHUNK)
        except OSError:
            data = b""
        if not data:
            self.closed = True
            return
        self._buffer += data
        *lines, rest = self._buffer.split(b"\n")
        self._buffer = rest
        self._messages.extend(json.loads(line) for line in lines)

    def close(self) -> None:
        """Close this end, which ends the rank at the other one."""
        self.closed = True
        self._selector.close()
        self._socket.close()


def control_pair() -> tuple[ControlLink, socket.socket]:
    """Make a connection: the end of whoever starts a rank, and the socket that the rank inherits."""
    here, there = socket.socketpair()
    return ControlLink(here), there
