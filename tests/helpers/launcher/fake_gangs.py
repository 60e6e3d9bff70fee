"""A dispatcher over gangs that draw nothing."""

from __future__ import annotations

import io
import time

from xdit_core.errors import RequestCancelled, UsageError, XditError
from xdit_launcher.gang.job import GangEnded, GangRequest, Job, Picture
from xdit_launcher.serve.dispatcher import Dispatcher
from xdit_launcher.serve.gangs.replicas import Replicas
from xdit_launcher.serve.limits import ServeSettings
from xdit_launcher.serve.operations import Log, Metrics
from xdit_launcher.serve.records import NewJob
from xdit_launcher.serve.store import Store


class FakeGang:
    """A gang whose requests the test answers."""

    load_seconds = 0.0

    def __init__(self) -> None:
        self.alive, self.error = True, None
        self.jobs: list[Job] = []

    def submit(self, prompts, *, previews=0, **settings):
        if "wrong" in settings:
            raise UsageError("wrong is not taken; leave it out.")
        job = Job(str(len(self.jobs)), GangRequest(tuple(prompts), settings, previews), (0,), self._look)
        job.add("started")
        self.jobs.append(job)
        return job

    def _look(self):
        for job in self.jobs:
            if job.cancel_wanted and not job.ended:
                job.add("cancelled", error=RequestCancelled("the request was cancelled."))

    def done(self, number):
        job = self.jobs[number]
        job._pictures[0, 0] = Picture((PNG,))
        job.add("done")

    def die(self):
        self.alive, self.error = False, GangEnded("rank 1 was killed\nmore lines")
        for job in self.jobs:
            if not job.ended:
                job.add("failed", error=self.error)

    def close(self):
        self.alive = False


def _png() -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    return buffer.getvalue()


PNG = _png()


class Setting:
    """A dispatcher over a store in a folder, with all gangs that it started."""

    def __init__(self, folder, replicas="1", **limits):
        self.gangs: list[FakeGang] = []
        self.refusals, self.replicas = 0, Replicas.parse(replicas)
        self.store = Store(str(folder))
        self.log = io.StringIO()
        self.dispatcher = Dispatcher(
            self.store, self, ServeSettings(**{"queue": 10, **limits}), Log(self.log), Metrics()
        )
        self.dispatcher.start()

    def start(self, number, unwanted):
        if self.refusals:
            self.refusals -= 1
            raise XditError("no weights.")
        self.gangs.append(FakeGang())
        return self.gangs[-1]

    def running(self):
        return None

    def renew(self):
        return False

    def accept(self, key="", **more):
        settings = more.pop("settings", {})
        return self.dispatcher.accept(NewJob(key, "job", {"prompt": "x", "settings": settings}, **more))[0].id

    def gang(self, number, jobs=0):
        """The gang of a number, when it has got so many jobs."""
        until(lambda: len(self.gangs) > number and len(self.gangs[number].jobs) >= jobs)
        return self.gangs[number]

    def ended(self, id):
        until(lambda: self.store.find(id).ended is not None)
        return self.store.find(id)

    def close(self):
        self.dispatcher.drain()
        for gang in self.gangs:
            gang.alive = False
            for job in gang.jobs:
                if not job.ended:
                    job.cancel()
        self.dispatcher.wait(10)
        for runner in self.dispatcher._runners:
            runner.join(10)
        self.store.close()


def until(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
