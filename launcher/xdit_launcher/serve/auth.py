"""Keys of clients: read from a file or a variable, kept as hashes, compared in constant time. Without torch."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
from collections.abc import MutableMapping
from pathlib import Path

from xdit_core.errors import UsageError
from xdit_core.filesystem import read_text, user_path
from xdit_launcher.serve.limits import ApiError

VARIABLE = "XDIT_API_KEYS"
SHORTEST = 16  # characters of a key
NAME = 12  # characters of the hash that name a key in the store and in logs
FIX = "give a file with one key on each line"


class Keys:
    """The keys that open the server; without any, everybody who reaches it may use it.

    Args:
        file: as of ``--keys``.
        environment: where ``XDIT_API_KEYS`` is read and taken away, so that the ranks do not get it.

    Raises:
        UsageError: the file cannot be read or holds no key, or a key is too short.
    """

    def __init__(self, file: str | None, environment: MutableMapping[str, str] | None = None) -> None:
        self._file = file
        text = (os.environ if environment is None else environment).pop(VARIABLE, "")
        self._fixed = hashes([key.strip() for key in text.split(",") if key.strip()], VARIABLE)
        self._hashes = self._fixed + self._read()

    def _read(self) -> tuple[bytes, ...]:
        if self._file is None:
            return ()
        given = f"--keys {self._file}"
        lines = read_text(Path(user_path(self._file, "--keys ")), given, FIX).splitlines()
        keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not keys:
            raise UsageError(f"{given} holds no key; {FIX}.")
        return hashes(keys, given)

    def reload(self) -> int:
        """Read the file again; if that fails the keys stay as they are.

        Returns:
            The number of keys.

        Raises:
            UsageError: the file cannot be read, or a key is too short.
        """
        self._hashes = self._fixed + self._read()
        return len(self._hashes)

    @property
    def needed(self) -> bool:
        """Whether a client needs a key."""
        return bool(self._hashes)

    def name_of(self, authorization: str | None) -> str:
        """The name of the key in a header ``Authorization: Bearer KEY``, "" where no key is needed.

        Raises:
            ApiError: there is no key, or an unknown one.
        """
        if not self._hashes:
            return ""
        word, _, key = (authorization or "").partition(" ")
        if word.lower() != "bearer" or not key.strip():
            raise ApiError(
                "this server needs a key; send it in the header Authorization: Bearer KEY.", 401, code="invalid_api_key"
            )
        digest = hashlib.sha256(key.strip().encode("utf-8", "replace")).digest()
        known = [hmac.compare_digest(digest, other) for other in self._hashes]  # all of them, whichever it is
        if not any(known):
            raise ApiError(
                "this key is not known; use one of those that the server was started with.", 401, code="invalid_api_key"
            )
        return digest.hex()[:NAME]


def hashes(keys: list[str], given: str) -> tuple[bytes, ...]:
    """The hashes of keys.

    Raises:
        UsageError: one is too short to be safe.
    """
    for i, key in enumerate(keys):
        if len(key) < SHORTEST:
            raise UsageError(
                f"key {i + 1} of {given} has {len(key)} characters; give at least {SHORTEST}, such as the output of "
                "openssl rand -hex 24."
            )
    return tuple(hashlib.sha256(key.encode()).digest() for key in keys)


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine only."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_host(host: str, keys: Keys) -> None:
    """Refuse to open the server to others without a key.

    Raises:
        UsageError: it would be open.
    """
    if not is_loopback(host) and not keys.needed:
        raise UsageError(
            f"--host {host} lets other machines in and there is no key; give --keys FILE or {VARIABLE}, or leave out "
            "--host to listen on 127.0.0.1."
        )
