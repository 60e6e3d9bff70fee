"""A server as a process of its own, for tests."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PATIENCE = 120.0  # seconds: other tests may take the processors
KEYS = ("first-key-of-the-tests", "second-key-of-the-tests")


class Served:
    """A server as a process of its own.

    Args:
        folder: where it works; its data are in ``data``.
        words: of the command line.
        env: variables beside those of this process.
    """

    def __init__(self, folder: Path, *words: str, key: str | None = None, **env: str) -> None:
        self.folder, self.key = folder, key
        folder.mkdir(exist_ok=True)
        self._log = open(folder / "log", "ab")  # noqa: SIM115  it belongs to the process
        command = [sys.executable, "-m", "xdit_launcher.cli", "serve", "--port", "0", "--data", "data", *words]
        self.process = subprocess.Popen(
            command, cwd=folder, env={**os.environ, **env}, stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("listening on http://127.0.0.1:"), self.log()
        self.url = line.split()[-1]

    def http(self, key: str | None = None) -> Any:
        """A client of our own API."""
        httpx = pytest.importorskip("httpx")
        key = key or self.key
        return httpx.Client(
            base_url=self.url, timeout=PATIENCE, headers={"Authorization": f"Bearer {key}"} if key else {}
        )

    def openai(self, key: str | None = None) -> Any:
        """The official client of OpenAI's API."""
        openai = pytest.importorskip("openai")
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=key or self.key or "none", max_retries=0, timeout=PATIENCE
        )

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def events(self, name: str) -> list[dict[str, Any]]:
        """The lines of the log about something."""
        lines = [json.loads(line) for line in self.log().splitlines() if line.startswith("{")]
        return [line for line in lines if line["event"] == name]

    def ready(self) -> Served:
        with self.http() as client:
            wait_for(lambda: client.get("/ready").status_code == 200, self.log)
        return self

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        code = self.process.wait(PATIENCE)
        self.close()
        return code

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self._log.close()


def wait_for(condition: Callable[[], Any], otherwise: Callable[[], str] = str) -> Any:
    """Wait until something holds, and return it."""
    end = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < end, otherwise()
        time.sleep(0.05)
    return value


def ended(client: Any, id: str) -> dict[str, Any]:
    """Wait until a job has ended."""

    def look() -> dict[str, Any] | None:
        job: dict[str, Any] = client.get(f"/v1/jobs/{id}").json()
        return job if job["status"] in ("done", "failed", "cancelled") else None

    found: dict[str, Any] = wait_for(look)
    return found
