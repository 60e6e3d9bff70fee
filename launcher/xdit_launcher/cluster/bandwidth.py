"""Measure latency and bandwidth between two machines over TCP, in about a second."""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from threading import Thread
from typing import Any

PINGS = 20
BLOCK = 1 << 18  # bytes at a time


def serve(seconds: float) -> int:
    """Answer `measure` on a free port for so many seconds.

    Returns:
        The port.
    """
    server = socket.create_server(("", 0), backlog=64)
    server.settimeout(seconds)

    def answer(connection: socket.socket) -> None:
        with suppress(OSError), connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.settimeout(seconds)
            for _ in range(PINGS):
                connection.sendall(connection.recv(1))
            received = 0
            while data := connection.recv(BLOCK):
                received += len(data)
            connection.sendall(received.to_bytes(8, "big"))

    def accept() -> None:
        with suppress(OSError), server:
            while True:
                Thread(target=answer, args=(server.accept()[0],), daemon=True).start()

    Thread(target=accept, daemon=True).start()
    return int(server.getsockname()[1])


def answering(addresses: Sequence[str], port: int, seconds: float = 3.0) -> dict[str, str]:
    """Try names and addresses at a port, all at once.

    Returns:
        Those that answer, each with the address to which it led.
    """
    reached: dict[str, str] = {}

    def attempt(address: str) -> None:
        with suppress(OSError), socket.create_connection((address, port), timeout=seconds) as connection:
            reached[address] = connection.getpeername()[0]

    threads = [Thread(target=attempt, args=(a,), daemon=True) for a in dict.fromkeys(addresses)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds + 1)
    return dict(reached)


def measure(addresses: Sequence[str], port: int, seconds: float) -> dict[str, Any]:
    """Measure the connection to another machine that runs `serve`.

    Args:
        addresses: of the other machine; the first that answers is used.
        port: on which it serves.
        seconds: for how long data is sent.

    Returns:
        ``address``, ``latency`` (the median of the seconds of a round trip) and ``bandwidth`` (bytes per second); empty
        if no address answers.
    """
    reached = answering(addresses, port)
    for address in (a for a in addresses if a in reached):
        with suppress(OSError), socket.create_connection((address, port), timeout=3) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.settimeout(20 + seconds)
            trips = []
            for _ in range(PINGS):
                start = time.perf_counter()
                connection.sendall(b".")
                connection.recv(1)
                trips.append(time.perf_counter() - start)
            block, start = bytes(BLOCK), time.perf_counter()
            while time.perf_counter() - start < seconds:
                connection.sendall(block)
            connection.shutdown(socket.SHUT_WR)
            received = int.from_bytes(connection.recv(8), "big")  # when all has arrived, not when all was handed over
            duration = time.perf_counter() - start
            return {"address": address, "latency": statistics.median(trips), "bandwidth": received / duration}
    return {}
