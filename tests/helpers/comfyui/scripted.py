"""The real server over a gang that draws nothing: prompts say how it behaves. In this process, and quick."""

from __future__ import annotations

import contextlib
import io
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import uvicorn
from PIL import Image

from helpers.launcher.served import PATIENCE, wait_for
from xdit_core.errors import RequestCancelled
from xdit_core.plan import Plan
from xdit_launcher.gang.gang import seeds_of
from xdit_launcher.gang.job import GangRequest, Job, Picture, RequestFailed
from xdit_launcher.serve.api.app import Guard, make_app
from xdit_launcher.serve.api.common import Server
from xdit_launcher.serve.auth import Keys
from xdit_launcher.serve.command import listening
from xdit_launcher.serve.dispatcher import Dispatcher
from xdit_launcher.serve.gangs.replicas import Replicas
from xdit_launcher.serve.limits import RequestCheck, ServeSettings
from xdit_launcher.serve.operations import Log, Metrics
from xdit_launcher.serve.store import Store
from xdit_launcher.serve.webhooks.addresses import Webhooks

STEPS = 4


def drawn(seed: int, side: int = 16) -> bytes:
    """What is drawn for a seed, as PNG."""
    buffer = io.BytesIO()
    gradient = [(i % 256, seed % 256, 255 - i % 256) for i in range(side * side)]
    picture = Image.new("RGB", (side, side))
    picture.putdata(gradient)
    picture.save(buffer, "PNG")
    return buffer.getvalue()


class ScriptedGang:
    """A gang that draws `drawn` of each seed. A prompt with ``watched`` begins when somebody watches, one with ``wait``
    is drawn until it is cancelled, and one with ``fail`` fails.

    Args:
        watched: whether somebody watches.
    """

    load_seconds = 0.0
    error = None

    def __init__(self, plan: Plan, watched: Callable[[], Any]) -> None:
        self.plan, self.alive, self._watched = plan, True, watched
        self.jobs: list[Job] = []

    def submit(self, prompts: Any, *, previews: int = 0, **settings: Any) -> Job:
        seeds = seeds_of(self.plan, {**settings, "seed": self._seeds(settings["seed"])})
        job = Job(str(len(self.jobs)), GangRequest(tuple(prompts), settings, previews), seeds)
        self.jobs.append(job)
        threading.Thread(target=self._draw, args=(job,), daemon=True).start()
        return job

    def _seeds(self, seed: Any) -> list[int]:
        return seed if isinstance(seed, list) else [seed]

    def _draw(self, job: Job) -> None:
        prompt = job.request.prompts[0]
        if "watched" in prompt:
            wait_for(self._watched)
        job.add("started")
        job.add("encoding")
        for step in range(1, STEPS + 1):
            job.add("step", step=step, steps=STEPS)
            if step == 2 and job.request.previews:
                job.add("preview", step=step - 1, steps=STEPS, number=0, data=drawn(0))
        if "wait" in prompt:
            while not job.cancel_wanted and self.alive:
                time.sleep(0.01)
            job.add("cancelled", error=RequestCancelled())
        elif "fail" in prompt:
            job.add("failed", error=RequestFailed("the latents came out as not a number; take a lower guidance."))
        else:
            video = self.plan.facts.video
            for number, seed in enumerate(job.seeds):
                frames = tuple(drawn(i) for i in range(5)) if video else (drawn(seed),)
                job._pictures[0, number] = Picture(frames, video, seed)
            job.add("done")

    def close(self) -> None:
        self.alive = False


class ScriptedGangs:
    """One `ScriptedGang`, started again when it has ended; arguments are its own."""

    def __init__(self, plan: Plan, watched: Callable[[], Any]) -> None:
        self._plan, self._watched, self.replicas = plan, watched, Replicas()

    def start(self, number: int, unwanted: Callable[[], bool]) -> ScriptedGang:
        return ScriptedGang(self._plan, self._watched)

    def running(self) -> None:
        return None

    def renew(self) -> bool:
        return False


class Scripted:
    """A running server.

    Args:
        url: where it is.
        dispatcher: of its jobs.
    """

    def __init__(self, url: str, dispatcher: Dispatcher) -> None:
        self.url, self.dispatcher = url, dispatcher

    def jobs(self) -> list[Any]:
        """All jobs, the newest first."""
        return self.dispatcher.store.page("", ("job",), None, None, 100)


@contextlib.contextmanager
def scripted(plan: Plan, folder: Path, keys: str | None = None) -> Iterator[Scripted]:
    """A server over a `ScriptedGang`, for the block.

    Args:
        keys: file with keys.
    """

    def watched() -> bool:
        return bool(dispatcher._watchers._watches)

    limits, log, metrics = ServeSettings(), Log(io.StringIO()), Metrics()
    with listening("127.0.0.1", 0) as end, contextlib.closing(Store(str(folder))) as store:
        dispatcher = Dispatcher(store, ScriptedGangs(plan, watched), limits, log, metrics)
        server = Server(dispatcher, RequestCheck(plan, limits), Keys(keys, {}), store.secret(), time.time(), Webhooks())
        config = uvicorn.Config(
            Guard(make_app(server), server, "127.0.0.1"), log_config=None, timeout_graceful_shutdown=1
        )
        http = uvicorn.Server(config)
        thread = threading.Thread(target=http.run, kwargs={"sockets": [end]})
        dispatcher.start()
        thread.start()
        try:
            wait_for(lambda: http.started and dispatcher.ready)
            yield Scripted(f"http://127.0.0.1:{end.getsockname()[1]}", dispatcher)
        finally:
            dispatcher.drain()
            dispatcher.wait(PATIENCE)
            http.should_exit = True
            thread.join()
