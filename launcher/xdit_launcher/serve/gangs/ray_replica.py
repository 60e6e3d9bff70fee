"""A replica of Ray Serve that owns a gang: what runs in its actor. Without torch."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from xdit_core.errors import XditError
from xdit_core.plan import Plan
from xdit_launcher.backends import ray as backend
from xdit_launcher.backends.base import Backend
from xdit_launcher.gang.job import Event, Job, Result
from xdit_launcher.gang.loras import AllowedLoras
from xdit_launcher.serve.gangs.beside import started

LOOK = 0.2  # seconds between two looks at the gang
LAST_WORDS = 1.0  # seconds in which a replica whose gang has ended can still say why

Answer = Event | list[Result] | XditError  # the last one of a request is its results, or why there are none


class Replica:
    """A gang in an actor. Its ranks are actors in the placement group that Ray Serve reserved with the replica.

    Args:
        plan: as JSON.
        settings: of the backend ``ray``.
        batch: the most pictures that are drawn together.
        generation: replicas of another one are replaced.
    """

    def __init__(self, plan: str, settings: backend.Settings, batch: int, generation: float) -> None:
        self._closing = False
        self._gang = started(Plan.from_json(plan), Backend("ray", backend, settings), batch)
        threading.Thread(target=self._watch, name="xdit-replica", daemon=True).start()

    def check_health(self) -> None:
        """Called by Ray Serve.

        Raises:
            XditError: the gang has ended.
        """
        if not self._gang.alive:
            raise self._gang.error or XditError("the gang has ended.")

    async def load_seconds(self) -> float:
        """How long the model took to load."""
        return self._gang.load_seconds

    async def draw(
        self, prompts: Sequence[str], previews: int, settings: Mapping[str, Any], loras: Mapping[str, str]
    ) -> AsyncIterator[Answer]:
        """Answer a request, which may ask for some LoRAs; it is cancelled if nobody wants the rest."""
        job: Job | None = None
        try:
            if dict(self._gang.loras) != dict(loras):
                self._gang.loras = AllowedLoras(loras)
            job = self._gang.submit(prompts, previews=previews, **settings)
            events = job.events()
            while (event := await asyncio.to_thread(next, events, None)) is not None:
                yield event if event.kind == "preview" else replace(event, data=b"")
            yield job.result()
        except XditError as error:
            yield error
        finally:
            if job is not None:
                job.cancel()

    def _watch(self) -> None:
        """End with the gang, so that Ray Serve starts another replica at once."""
        while self._gang.alive:
            time.sleep(LOOK)
        if not self._closing:
            time.sleep(LAST_WORDS)
            os._exit(1)

    def __del__(self) -> None:
        self._closing = True
        with contextlib.suppress(AttributeError):  # it was never started
            self._gang.close()
