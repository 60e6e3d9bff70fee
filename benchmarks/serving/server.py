"""A server as a process of its own, for the programs beside this one: it can be killed, and started again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx
import psutil

ENDED = ("done", "failed", "cancelled")
PATIENCE = 600.0  # seconds


class Server:
    """A server over a folder.

    Args:
        folder: of its log and its jobs.
        settings: of the command line, those of the server too.
        plugins: names of strategies, between commas.
    """

    def __init__(self, folder: str, settings: dict[str, object], plugins: str = "") -> None:
        self.folder, self.url = folder, ""
        os.makedirs(folder, exist_ok=True)
        self._words = [*(("--plugins", plugins) if plugins else ()), *(f"{k}={v}" for k, v in settings.items())]
        self.start()

    def start(self) -> None:
        """Start it, and wait until it listens."""
        command = [sys.executable, "-m", "xdit_launcher.cli", "serve", "--port", "0", "--data", f"{self.folder}/data"]
        with open(f"{self.folder}/log", "ab") as log:
            self.process = subprocess.Popen(
                [*command, *self._words], stdout=subprocess.PIPE, stderr=log, text=True, bufsize=1
            )
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().split()[-1]

    def ready(self) -> Server:
        """Wait until its ranks answer."""
        with self.client() as http:
            while http.get("/ready").status_code != 200:
                time.sleep(0.1)
        return self

    def client(self) -> httpx.Client:
        """A client of this server as it is now."""
        return httpx.Client(base_url=self.url, timeout=PATIENCE)

    def ranks(self) -> list[psutil.Process]:
        """Its ranks, and those of killed servers over this folder."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            line = " ".join(process.info["cmdline"] or ())
            if "xdit_core.worker" in line and self.folder in line:
                found.append(process)
        return found

    def memory(self) -> dict[str, float]:
        """MiB of the server, and of its ranks together."""
        here = psutil.Process(self.process.pid)
        ranks = [process for process in here.children(recursive=True) if "xdit_core.worker" in process.cmdline()]
        sizes = {"server": here.memory_info().rss, "ranks": sum(rank.memory_info().rss for rank in ranks)}
        return {name: size / 2**20 for name, size in sizes.items()}

    def kill(self) -> None:
        """End it with SIGKILL."""
        self.process.kill()
        self.process.wait()

    def end(self) -> None:
        """End it well."""
        self.process.terminate()
        self.process.wait(PATIENCE)

    def log(self) -> Iterator[dict[str, Any]]:
        """The lines of its log."""
        with open(f"{self.folder}/log") as lines:
            for line in lines:
                if line.startswith("{"):
                    yield json.loads(line)


def wait(http: httpx.Client, id: str) -> dict[str, Any]:
    """Wait for the end of a job."""
    with http.stream("GET", f"/v1/jobs/{id}/events") as answer:
        for _ in answer.iter_lines():
            pass
    while True:
        job: dict[str, Any] = http.get(f"/v1/jobs/{id}").raise_for_status().json()
        if job["status"] in ENDED:
            return job
        time.sleep(0.05)
