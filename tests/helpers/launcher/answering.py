"""A server within this process whose gang draws nothing and answers at once."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from helpers.launcher.fake_gangs import FakeGang
from xdit_core.observe.spans import Record
from xdit_core.planning.planner import make_plan
from xdit_launcher.gang.job import Job
from xdit_launcher.gang.loras import LoraFile
from xdit_launcher.serve.auth import Keys
from xdit_launcher.serve.command import address_of, answer, listening
from xdit_launcher.serve.gangs.replicas import Replicas
from xdit_launcher.serve.limits import take_settings


class AnsweringGang(FakeGang):
    """A gang whose requests have ended before anybody looks; ``requests`` are their settings."""

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[dict[str, Any]] = []

    def submit(self, prompts: Any, *, previews: int = 0, **settings: Any) -> Job:
        job = super().submit(prompts, previews=previews, **settings)
        if settings.get("trace"):
            job._records.append(Record(0, "a machine", []))
        self.done(len(self.jobs) - 1)
        self.requests.append(settings)
        return job


class AnsweringGangs:
    """One such gang."""

    replicas = Replicas()

    def __init__(self) -> None:
        self.gangs: list[AnsweringGang] = []

    def start(self, number: int, unwanted: Any) -> AnsweringGang:
        self.gangs.append(AnsweringGang())
        return self.gangs[-1]

    def running(self) -> None:
        return None

    def renew(self) -> bool:
        return False


@contextlib.contextmanager
def answering(folder: Path, **settings: Any) -> Iterator[tuple[str, AnsweringGangs]]:
    """A server over the bundled model, for which no rank is started.

    Args:
        settings: flat, with underscores instead of dots in those of the server: ``serve_queue=10``.

    Returns:
        Its address, and its gangs.
    """
    values = {name.replace("serve_", "serve."): value for name, value in settings.items()}
    limits, values = take_settings({"model": "emoji", "device": "cpu", "runs": str(folder / "runs"), **values})
    plan, gangs, stop = make_plan([], values, devices=1), AnsweringGangs(), threading.Event()
    with listening("127.0.0.1", 0) as end:
        end.listen()
        loras = LoraFile(None, plan)
        arguments = (plan, gangs, limits, Keys(None), loras, str(folder / "data"), "127.0.0.1", end, stop)
        thread = threading.Thread(target=answer, args=arguments)
        thread.start()
        try:
            yield f"http://{address_of(end)}", gangs
        finally:
            stop.set()
            thread.join(30)
