"""A real ComfyUI as a process of its own, without a screen, driven through its API."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from helpers.launcher.served import PATIENCE, wait_for

NODES = Path(__file__).parents[3] / "launcher" / "xdit_comfyui"


class ComfyUI:
    """A ComfyUI with our nodes.

    Args:
        source: folder of ComfyUI.
        folder: where it works.
        python: that has what ComfyUI needs.
        more: content of a file with further nodes.
    """

    def __init__(self, source: Path, folder: Path, python: str = sys.executable, more: str = "", **env: str) -> None:
        import httpx

        for name in ("models", "input", "output", "temp", "user", "custom_nodes"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / "custom_nodes" / NODES.name).symlink_to(NODES)
        (folder / "custom_nodes" / "nodes_of_the_test.py").write_text(more or "NODE_CLASS_MAPPINGS = {}\n")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        words = ["--cpu", "--port", str(port), "--base-directory", str(folder), "--disable-api-nodes"]
        words += ["--database-url", "sqlite:///:memory:"]
        self.folder, self._log = folder, open(folder / "log", "ab")  # noqa: SIM115  it belongs to the process
        inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self.process = subprocess.Popen(
            [python, "main.py", *words], cwd=source, env={**inherited, **env}, stdout=self._log, stderr=self._log
        )
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, timeout=PATIENCE)
        wait_for(self._answers, self.log)

    def _answers(self) -> bool:
        assert self.process.poll() is None, self.log()
        with contextlib.suppress(OSError, Exception):
            return bool(self.http.get("/system_stats").status_code == 200)
        return False

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def queue(self, graph: dict[str, Any], client: str = "test") -> str:
        """Queue a workflow and return its id."""
        answer = self.http.post("/prompt", json={"prompt": graph, "client_id": client})
        assert answer.status_code == 200, answer.text
        id: str = answer.json()["prompt_id"]
        return id

    def ended(self, id: str) -> dict[str, Any]:
        """Wait until a workflow has ended, and return its history."""
        found: dict[str, Any] = wait_for(lambda: self.http.get(f"/history/{id}").json().get(id), self.log)
        return found

    def picture(self, output: dict[str, Any]) -> bytes:
        """A picture that a workflow has saved."""
        return self.http.get("/view", params=output).content

    def close(self) -> None:
        self.http.close()
        self.process.kill()
        self.process.wait()
        self._log.close()


class Messages(threading.Thread):
    """What ComfyUI tells one browser: JSON messages, and pictures as bytes."""

    def __init__(self, comfy: ComfyUI, client: str = "test") -> None:
        super().__init__(daemon=True)
        import websockets.sync.client as websockets

        self._socket = websockets.connect(
            f"{comfy.url.replace('http', 'ws')}/ws?clientId={client}", max_size=None, open_timeout=PATIENCE
        )
        self.texts: list[dict[str, Any]] = []
        self.pictures: list[bytes] = []
        self.start()

    def run(self) -> None:
        for message in self._socket:
            if isinstance(message, bytes):
                self.pictures.append(message)
            else:
                self.texts.append(json.loads(message))

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The data of all messages of a kind."""
        return [text["data"] for text in list(self.texts) if text["type"] == kind]

    def close(self) -> None:
        self._socket.close()
        self.join(PATIENCE)
