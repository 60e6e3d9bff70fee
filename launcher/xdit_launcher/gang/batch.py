"""Requests that the ranks draw together: one call of the pipeline, in which each picture has a prompt, a negative
prompt and a seed of its own. Without torch."""

from __future__ import annotations

import base64
import json
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from xdit_core.errors import RequestCancelled, XditError
from xdit_launcher.gang.job import Job

OWN = ("seed", "negative", "images")  # settings that may differ between the requests of a batch


class Batch:
    """Some requests, which the ranks get as one.

    Args:
        jobs: the requests, one or several that fit together.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.id = "+".join(job.id for job in jobs)
        self.jobs = tuple(jobs)
        self._left = list(jobs)
        counts = [len(job.seeds) for job in jobs]
        # number of the first picture of each request
        self._starts = {job.id: sum(counts[:i]) for i, job in enumerate(jobs)}

    def end_cancelled(self) -> bool:
        """End the requests that nobody wants any more, while others go on.

        Returns:
            Whether nobody wants any of them; they are then left, until the ranks have ended them together.
        """
        wanted = [job for job in self._left if not job.cancel_wanted]
        if not wanted:
            return True
        for job in self._left:
            if job.cancel_wanted:
                job.add("cancelled", error=RequestCancelled())
        self._left = wanted
        return False

    def begin(self) -> dict[str, Any]:
        """Say that the requests are drawn now.

        Returns:
            The message to the ranks.
        """
        for job in self.jobs:
            job.add("started", together=len(self.jobs))
        first = self.jobs[0].request
        if first.arguments:
            data = base64.b64encode(first.arguments).decode()
            return {"request": self.id, "arguments": data, "grid": first.grid}
        message = {"request": self.id, "prompts": first.prompts, "settings": first.settings, "previews": first.previews}
        if len(self.jobs) == 1:
            return {**message, "trace": first.trace}
        settings = {name: value for name, value in first.settings.items() if name not in OWN}
        settings["seed"] = [seed for job in self.jobs for seed in job.seeds]
        if "negative" in first.settings:
            settings["negative"] = [job.request.settings["negative"] for job in self.jobs for _ in job.seeds]
        texts = [job.request.prompts[0] for job in self.jobs for _ in job.seeds]
        return {**message, "prompts": [texts], "settings": settings}

    def take(self, message: Mapping[str, Any]) -> None:
        """Take a message of a rank about the pictures: each request gets what is about its own."""
        if len(self.jobs) == 1:
            self.jobs[0].take(message)
            return
        low, high = message["numbers"] if "numbers" in message else (message["number"], message["number"] + 1)
        for job in self._left:
            start = self._starts[job.id]
            a, b = max(low, start), min(high, start + len(job.seeds))
            if a >= b:
                continue
            own = {**message, "number": a - start, "numbers": [a - start, b - start]}
            if "safetensors" in message:
                own["safetensors"] = some_latents(message["safetensors"], a - low, b - low)
            job.take(own)

    def end(self, kind: str, error: XditError | None = None, **more: Any) -> None:
        """All that is left has ended.

        Args:
            more: of the event.
        """
        for job in self._left:
            job.add(kind, error=error, **more)
        self._left = []

    def apart(self) -> list[Job]:
        """The requests that are left, to be drawn one by one."""
        left, self._left = self._left, []
        for job in left:
            job.alone = True
        return left


def next_batch(queue: deque[Job], most: int) -> Batch | None:
    """Take the next request out of a queue, with all that fit it.

    Args:
        most: pictures of a batch of several requests.

    Returns:
        None if there is none; one that was cancelled meanwhile ends.
    """
    for job in [job for job in queue if job.cancel_wanted]:
        queue.remove(job)
        job.add("cancelled", error=RequestCancelled())
    if not queue:
        return None
    first = queue.popleft()
    chosen, pictures, kind = [first], len(first.seeds), kind_of(first)
    for job in list(queue) if kind else ():
        if kind_of(job) == kind and pictures + len(job.seeds) <= most:
            queue.remove(job)
            chosen.append(job)
            pictures += len(job.seeds)
    return Batch(chosen)


def kind_of(job: Job) -> str:
    """What requests that are drawn together have in common; "" if this one is drawn alone."""
    request = job.request
    if (
        job.alone
        or request.trace
        or len(request.prompts) != 1
        or not isinstance(request.prompts[0], str)
        or "call" in request.settings
    ):
        return ""
    common = {name: value for name, value in request.settings.items() if name not in OWN}
    return json.dumps([common, request.settings.get("negative") is None, request.previews], sort_keys=True)


def some_latents(safetensors: str, start: int, stop: int) -> str:
    """Rows of the tensor ``latents``, as safetensors in base64."""
    from safetensors.numpy import load, save

    latents = load(base64.b64decode(safetensors))["latents"]
    return base64.b64encode(save({"latents": latents[start:stop].copy()})).decode()
