"""Have a server draw, with ComfyUI's progress bar, previews and Cancel button."""

from __future__ import annotations

import base64
import contextlib
import time
from collections.abc import Generator, Mapping
from functools import partial
from typing import Any

from . import client
from .client import ConnectionLost, Server, ServerError, beside, events_in, form, parsed
from .pictures import opened

ENDS = ("done", "failed", "cancelled")
LARGEST_PREVIEW = 512  # pixels a side
BACK_WITHIN = 60.0  # seconds for which a server may be away while it has our job
PAUSE = 1.0  # seconds between two tries to reach it

Event = tuple[str, dict[str, Any]]


def look() -> None:
    """Raise ComfyUI's exception if the user has pressed Cancel."""
    from comfy.model_management import throw_exception_if_processing_interrupted

    throw_exception_if_processing_interrupted()


class Display:
    """What the user sees on a node.

    Args:
        node: its id, None if it is not known.
    """

    def __init__(self, node: str | None) -> None:
        from comfy.utils import ProgressBar

        self._node, self._bar, self._step = node, ProgressBar(1), 0

    def take(self, name: str, data: Mapping[str, Any]) -> None:
        """Show an event of a job."""
        if name == "queued" and data.get("position"):
            self.say(f"number {data['position']} in the queue")
        elif name == "encoding":
            self.say("")
        elif name == "step":
            self._step = data["step"]
            self._bar.update_absolute(self._step, data["steps"])
        elif name == "preview" and data.get("b64_png"):
            picture = opened(base64.b64decode(data["b64_png"]))
            # it comes a step later than the step that it shows, and the bar does not go back
            self._bar.update_absolute(self._step, data["steps"], ("JPEG", picture, LARGEST_PREVIEW))

    def say(self, text: str) -> None:
        """Show a line of text below the node, where this ComfyUI can."""
        with contextlib.suppress(ImportError, AttributeError):
            from server import PromptServer

            PromptServer.instance.send_progress_text(text, self._node)


def events_of(server: Server, id: str) -> Generator[Event]:
    """What happens to a job, until it has ended; a server that is started again in between goes on.

    Raises:
        ServerError: the server is away for too long, or does not know the job.
    """
    last_heard = time.monotonic()
    while True:
        try:
            with server.send("GET", f"/v1/jobs/{id}/events") as exchange:
                for name, data in beside(partial(events_in, exchange), look):
                    last_heard = time.monotonic()
                    yield name, data
                    if name in ENDS:
                        return
        except ConnectionLost as error:
            if time.monotonic() - last_heard > BACK_WITHIN:
                raise ConnectionLost(f"{server.address} went away; start xdit-launch serve there again.") from error
        again = time.monotonic() + PAUSE
        while time.monotonic() < again:
            look()
            time.sleep(client.LOOK)


def draw(server: Server, body: Mapping[str, Any], video: bool, node: str | None) -> tuple[dict[str, Any], list[bytes]]:
    """Have a job drawn. If anything goes wrong on this side, or the user presses Cancel, it is cancelled.

    Args:
        body: of ``POST /v1/jobs``.
        video: it must be a video.
        node: id of the node that shows how far it is.

    Returns:
        The job, and its files.

    Raises:
        ServerError: the server refuses, or could not draw it.
        Exception: ComfyUI's, if the user presses Cancel.
    """
    display = Display(node)
    job = server.ask("POST", "/v1/jobs", body)
    try:
        if bool(job["settings"].get("video")) != video:
            makes, other = ("pictures", "xdit Generate") if video else ("videos", "xdit Video")
            raise ServerError(f"the model of {server.address} makes {makes}; use the node {other} (server).")
        with contextlib.closing(events_of(server, job["id"])) as events:
            for name, data in events:
                display.take(name, data)
                job = data if name in ENDS else job
        display.say("")
        if job["status"] != "done" or not job.get("results"):
            raise ServerError(
                (job.get("error") or {}).get("message") or f"the job is {job['status']} without a result."
            )
        return job, [server.read(result["url"]) for result in job["results"]]
    except BaseException:
        with contextlib.suppress(ServerError):
            server.ask("DELETE", f"/v1/jobs/{job['id']}")
        raise


def edit(server: Server, fields: Mapping[str, Any], files: list[tuple[str, bytes]]) -> list[bytes]:
    """Have pictures edited; the server stops when the connection is closed, which the Cancel button does.

    Args:
        fields: of ``POST /v1/images/edits``.
        files: name of the field and PNG of each picture.

    Returns:
        The edited pictures.

    Raises:
        ServerError: the server refuses, or could not do it.
        Exception: ComfyUI's, if the user presses Cancel.
    """
    body, kind = form(fields, files)
    with server.send("POST", "/v1/images/edits", body, kind, patience=None) as exchange:
        data = parsed(next(beside(lambda: [exchange.read()], look)), server.address)
    return [base64.b64decode(item["b64_json"]) for item in data["data"]]
