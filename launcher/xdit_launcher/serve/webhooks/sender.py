"""A thread that calls the addresses of clients whose jobs have ended, signed as Standard Webhooks. Without torch."""

from __future__ import annotations

import base64
import concurrent.futures
import hashlib
import hmac
import http.client
import json
import sqlite3
import ssl
import threading
import time
from collections.abc import Mapping
from urllib.parse import urlsplit

from xdit_launcher.serve.operations import Log
from xdit_launcher.serve.records import DueWebhook
from xdit_launcher.serve.store import Store
from xdit_launcher.serve.webhooks.addresses import Webhooks

PERIOD = 0.5  # seconds between two looks
TIMEOUT = 10.0  # seconds that an address has for its answer
AT_ONCE = 8  # addresses that are called at the same time
PAUSES = (5.0, 60.0, 300.0, 1800.0, 7200.0, 18000.0, 36000.0, 86400.0)  # seconds before each further try
GONE = 410  # status with which an address says that it wants no more


class WebhookSender:
    """Sends what is due, and tries again what could not be sent. Nothing waits for it.

    Args:
        store: has what is due, so a later server goes on.
        webhooks: what is allowed, and the secret.
        log: where to say what happens.
        pauses: seconds before each further try; then it is given up.
    """

    def __init__(self, store: Store, webhooks: Webhooks, log: Log, pauses: tuple[float, ...] = PAUSES) -> None:
        self._store, self._webhooks, self._log, self._pauses = store, webhooks, log, pauses
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="xdit-webhooks", daemon=True)

    def __enter__(self) -> WebhookSender:
        if self._webhooks.allowed:
            self._thread.start()
        return self

    def __exit__(self, *details: object) -> None:
        self._stop.set()
        if self._webhooks.allowed:
            self._thread.join()

    def _run(self) -> None:
        with concurrent.futures.ThreadPoolExecutor(AT_ONCE, "xdit-webhook") as pool:
            while not self._stop.wait(PERIOD):
                try:
                    due = self._store.due_webhooks(time.time(), AT_ONCE)
                    list(pool.map(self._send, due))
                except (OSError, sqlite3.Error) as error:
                    self._log.unexpected("webhooks could not be read or noted", error)

    def _send(self, due: DueWebhook) -> None:
        """Try once."""
        try:
            status = self._post(due)
            error = None if 200 <= status < 300 else f"status {status}"
        except (OSError, ValueError, http.client.HTTPException) as problem:
            status, error = 0, f"{type(problem).__name__}: {problem}"
        if error is None:
            self._store.webhook_settled(due.job)
            self._log.write("webhook sent", job=due.job, tries=due.tries + 1)
        elif status == GONE or due.tries >= len(self._pauses):
            self._store.webhook_settled(due.job)
            self._log.write("webhook given up", "warning", job=due.job, tries=due.tries + 1, error=error)
        else:
            pause = self._pauses[due.tries]
            self._store.webhook_postponed(due.job, time.time() + pause)
            self._log.write("webhook will be tried again", "warning", job=due.job, error=error, pause=pause)

    def _post(self, due: DueWebhook) -> int:
        """Call the address, and follow no redirect.

        Returns:
            The status of the answer.

        Raises:
            OSError, HTTPException: it could not be reached.
        """
        body = body_of(due)
        headers = signed(f"job_{due.job}", round(time.time()), body, self._webhooks.secret)
        parts = urlsplit(due.url)
        host, target = str(parts.hostname), parts.path + (f"?{parts.query}" if parts.query else "")
        if parts.scheme == "https":
            context = ssl.create_default_context()
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                host, parts.port, timeout=TIMEOUT, context=context
            )
        else:
            connection = http.client.HTTPConnection(host, parts.port, timeout=TIMEOUT)
        try:
            connection.request("POST", target, body, {"Content-Type": "application/json", **headers})
            return connection.getresponse().status
        finally:
            connection.close()


def body_of(due: DueWebhook) -> bytes:
    """What is sent: the end of a job. Who wants more asks for the job."""
    about = {"id": due.job, "status": due.status, "error": due.error}
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(due.ended))
    return json.dumps({"type": f"job.{due.status}", "timestamp": at, "data": about}).encode()


def signed(id: str, timestamp: int, body: bytes, secret: bytes) -> Mapping[str, str]:
    """The headers of Standard Webhooks.

    Args:
        id: the same for every try, so that a receiver can drop repetitions.
        timestamp: seconds since 1970.
    """
    digest = hmac.new(secret, f"{id}.{timestamp}.".encode() + body, hashlib.sha256).digest()
    return {
        "webhook-id": id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": f"v1,{base64.b64encode(digest).decode()}",
    }
