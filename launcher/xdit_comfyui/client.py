"""A client of ``xdit-launch serve`` with the standard library alone."""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import json
import os
import queue
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar
from urllib.parse import urlsplit

DEFAULT_ADDRESS = "http://127.0.0.1:8000"
SERVERS = "XDIT_SERVERS"  # variable with the addresses, divided by commas, that keys may be sent to
KEY = "XDIT_API_KEY"  # variable with the key
OURS = "XDIT_"  # what the name of every variable with a key begins with
CONNECT = 10.0  # seconds for a connection to be made
PATIENCE = 60.0  # seconds without a byte after which a server is given up; it says something every 15 s
LOOK = 0.1  # seconds between two looks whether the user wants to stop
FORM_BOUNDARY = "xdit-form-of-a-comfyui-node"

Item = TypeVar("Item")


class ServerError(Exception):
    """What the server refuses, or why it cannot be asked: a sentence with the fix."""


class ConnectionLost(ServerError):
    """The server cannot be reached, or went away in the middle of an answer."""


def addresses() -> list[str]:
    """The addresses in ``XDIT_SERVERS``."""
    return [address.strip().rstrip("/") for address in os.environ.get(SERVERS, "").split(",") if address.strip()]


def is_this_machine(host: str) -> bool:
    """Whether a host is reached from this machine only."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def key_for(address: str, variable: str) -> str | None:
    """The key for a server, None if there is none.

    A workflow may come from somebody else, so it can neither name any variable, nor have a key sent to any server.

    Args:
        address: of the server.
        variable: that holds the key; "" for none.

    Raises:
        ServerError: the variable is not one of ours, or the server is not known.
    """
    if not variable:
        return None
    if not variable.startswith(OURS):
        raise ServerError(f"key_variable={variable} does not begin with {OURS}; rename the variable.")
    key = os.environ.get(variable, "").strip()
    if not key:
        return None
    if not is_this_machine(urlsplit(address).hostname or "") and address not in addresses():
        raise ServerError(
            f"the key in {variable} is not sent to {address}, since {SERVERS} does not name it; start ComfyUI with "
            f"{SERVERS}={','.join([*addresses(), address])}."
        )
    return key


class Exchange:
    """A request that was sent, and the answer that comes. `close` may be called from any thread, and ends a read that
    waits.

    Args:
        connection: on which the request was sent.
        address: of the server.
    """

    def __init__(self, connection: http.client.HTTPConnection, address: str) -> None:
        self._connection, self._socket, self._address = connection, connection.sock, address

    def __enter__(self) -> Exchange:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[bytes]:
        """The lines of the answer; raises as `read` does."""
        try:
            yield from self._answer()
        except (OSError, http.client.HTTPException) as error:
            raise lost(self._address, error) from error

    def read(self) -> bytes:
        """All of the answer.

        Raises:
            ConnectionLost: the server went away.
            ServerError: it refuses, in its own words.
        """
        try:
            return self._answer().read()
        except (OSError, http.client.HTTPException) as error:
            raise lost(self._address, error) from error

    def _answer(self) -> http.client.HTTPResponse:
        response = self._connection.getresponse()
        if response.status >= 300:
            raise ServerError(sentence_of(response.read(), response.status, self._address))
        return response

    def close(self) -> None:
        """End the connection."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._connection.close()


def lost(address: str, error: Exception) -> ConnectionLost:
    """The sentence about a connection that failed."""
    why = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return ConnectionLost(
        f"there is no answer from {address} ({why}); start xdit-launch serve there, or correct the address."
    )


class Server:
    """A server.

    Args:
        address: such as ``http://127.0.0.1:8000``.
        variable: environment variable with the key.

    Raises:
        ServerError: the address is none, or the key may not be sent to it.
    """

    def __init__(self, address: str, variable: str = KEY) -> None:
        self.address = address.strip().rstrip("/") or DEFAULT_ADDRESS
        try:
            parts = urlsplit(self.address)
            self._host, self._port, self._path = parts.hostname, parts.port, parts.path
        except ValueError:
            self._host = None
        if self._host is None or parts.scheme not in ("http", "https"):
            raise ServerError(f"server={self.address[:100]} is no address; write for example {DEFAULT_ADDRESS}.")
        https = parts.scheme == "https"
        self._kind = http.client.HTTPSConnection if https else http.client.HTTPConnection
        key = key_for(self.address, variable.strip())
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    def send(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        kind: str = "application/json",
        patience: float | None = PATIENCE,
    ) -> Exchange:
        """Send a request.

        Args:
            body, kind: content, and its type.
            patience: seconds without a byte after which the server is given up.

        Raises:
            ConnectionLost: the server cannot be reached.
        """
        connection = self._kind(str(self._host), self._port, timeout=CONNECT)
        try:
            connection.connect()
            connection.sock.settimeout(patience)
            headers = {**self._headers, **({} if body is None else {"Content-Type": kind})}
            connection.request(method, self._path + path, body, headers)
        except (OSError, ValueError, http.client.HTTPException) as error:
            connection.close()
            raise lost(self.address, error) from error
        return Exchange(connection, self.address)

    def read(self, path: str) -> bytes:
        """The content at a path; raises as `send` and ``Exchange.read`` do."""
        with self.send("GET", path) as exchange:
            return exchange.read()

    def ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Send and receive JSON; raises as `read` does."""
        with self.send(method, path, None if body is None else json.dumps(body).encode()) as exchange:
            return parsed(exchange.read(), self.address)


def parsed(data: bytes, address: str) -> dict[str, Any]:
    """The JSON object in an answer.

    Raises:
        ServerError: it holds none.
    """
    try:
        value = json.loads(data)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ServerError(f"{address} does not answer like an xdit server; correct the address.")
    return value


def sentence_of(data: bytes, status: int, address: str) -> str:
    """What a server says in an answer that is an error."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        sentence = str(json.loads(data)["error"]["message"])
        fix = f" In ComfyUI, keys are read from variables such as {KEY}." if status == 401 else ""
        return sentence + fix
    return f"{address} answers with status {status} and not like an xdit server; correct the address."


def events_in(lines: Iterable[bytes]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and data of server-sent events."""
    name = ""
    for line in lines:
        field, _, value = line.decode("utf-8", "replace").strip().partition(": ")
        if field == "event":
            name = value
        elif field == "data":
            yield name, json.loads(value)


def form(fields: Mapping[str, Any], files: Iterable[tuple[str, bytes]]) -> tuple[bytes, str]:
    """A form with pictures.

    Args:
        fields: plain ones.
        files: name of the field and PNG of each picture.

    Returns:
        The body and its content type.
    """
    parts = [(f'name="{name}"', "text/plain", str(value).encode()) for name, value in fields.items()]
    parts += [(f'name="{name}"; filename="{i}.png"', "image/png", data) for i, (name, data) in enumerate(files)]
    body = b"".join(
        f"--{FORM_BOUNDARY}\r\nContent-Disposition: form-data; {about}\r\nContent-Type: {kind}\r\n\r\n".encode()
        + data
        + b"\r\n"
        for about, kind, data in parts
    )
    return body + f"--{FORM_BOUNDARY}--\r\n".encode(), f"multipart/form-data; boundary={FORM_BOUNDARY}"


def beside(items: Callable[[], Iterable[Item]], look: Callable[[], None]) -> Iterator[Item]:
    """Yield items that come from the network in a thread beside this one, where ``look`` is called meanwhile.

    Args:
        items: called in the other thread.
        look: raises if the user wants to stop.

    Raises:
        Exception: whatever ``items`` or ``look`` raises.
    """
    arrived: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()

    def work() -> None:
        try:
            for item in items():
                arrived.put(("item", item))
            arrived.put(("end", None))
        except Exception as error:
            arrived.put(("error", error))

    threading.Thread(target=work, name="xdit-server", daemon=True).start()
    while True:
        look()
        try:
            what, value = arrived.get(timeout=LOOK)
        except queue.Empty:
            continue
        if what == "error":
            raise value
        if what == "end":
            return
        yield value
