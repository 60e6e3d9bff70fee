"""Which addresses a server calls: those that its operator names, and no other. Without torch."""

from __future__ import annotations

import base64
import binascii
import os
from dataclasses import dataclass
from urllib.parse import urlsplit

from xdit_core.errors import UsageError
from xdit_launcher.serve.limits import ApiError, ServeSettings

SECRET = "XDIT_WEBHOOK_SECRET"  # environment variable
START = "whsec_"  # of the secret, as Standard Webhooks write it
MAKE_ONE = f'make one with: export {SECRET}="{START}$(openssl rand -base64 24)"'
LEAST_SECRET = 16  # bytes
LONGEST = 2000  # characters of an address


@dataclass(frozen=True)
class Webhooks:
    """What an operator allows.

    Args:
        allowed: addresses; one that ends in ``/`` allows every address that begins with it.
        secret: signs what is sent.
    """

    allowed: tuple[str, ...] = ()
    secret: bytes = b""

    @staticmethod
    def of(limits: ServeSettings) -> Webhooks:
        """From ``serve.webhooks=`` and the environment.

        Raises:
            UsageError: an address is none, or there is no secret.
        """
        allowed = tuple(url.strip() for url in limits.webhooks.split(",") if url.strip())
        for url in allowed:
            if not is_address(url) or not urlsplit(url).path:
                raise UsageError(
                    f"serve.webhooks={url} is no address; write for example https://example.com/hooks/, and several "
                    "between commas."
                )
        return Webhooks(allowed, secret_of(os.environ.get(SECRET, "")) if allowed else b"")

    def check(self, url: str) -> None:
        """Refuse an address that is not allowed.

        Raises:
            ApiError: it is not.
        """
        if not self.allowed:
            raise ApiError(
                "this server calls no address; leave webhook out, or have it started with serve.webhooks=.",
                param="webhook",
                code="unsupported",
            )
        known = any(url == one or (one.endswith("/") and url.startswith(one)) for one in self.allowed)
        if not known or not is_address(url):
            raise ApiError(
                f"webhook is none of the addresses that this server calls; write {' or '.join(self.allowed)}.",
                param="webhook",
                code="unsupported",
            )


def is_address(url: str) -> bool:
    """Whether a text is a plain address of HTTP, without anything that programs read in different ways."""
    if len(url) > LONGEST or not url.isascii() or not url.isprintable() or set(url) & set(' @\\#"<>') or ".." in url:
        return False
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def secret_of(text: str) -> bytes:
    """The bytes of a secret.

    Raises:
        UsageError: it is none.
    """
    try:
        secret = base64.b64decode(text.removeprefix(START), validate=True)
    except (binascii.Error, ValueError):
        secret = b""
    if not text.startswith(START) or len(secret) < LEAST_SECRET:
        raise UsageError(f"serve.webhooks= needs the variable {SECRET}, which signs what is sent; {MAKE_ONE}.")
    return secret
