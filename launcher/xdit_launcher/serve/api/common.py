"""What all faces of the service share: the caller, the way of a job from request to answer, events on a connection."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, WithJsonSchema, field_validator

from xdit_core.errors import XditError
from xdit_launcher.serve.auth import Keys
from xdit_launcher.serve.dispatcher import Dispatcher
from xdit_launcher.serve.events import CLOSING, JobEvent, Watch
from xdit_launcher.serve.limits import ApiError, CheckedRequest, RequestCheck
from xdit_launcher.serve.media import FORMATS
from xdit_launcher.serve.records import CANCELLED, DONE, NewJob, StoredFile, StoredJob
from xdit_launcher.serve.webhooks.addresses import Webhooks

GLANCE = 0.5  # seconds between two looks whether a client is still there
KEEP_ALIVE = 15.0  # seconds without an event after which a comment keeps a connection open
LONGEST_NAME = 200  # characters of an Idempotency-Key
MULTIPART = "multipart/form-data"


@dataclass(frozen=True)
class Server:
    """What the faces need.

    Args:
        dispatcher: has the queue, the store, the log and the metrics.
        check: of requests.
        keys: of clients.
        secret: signs addresses of results.
        started: ``time.time()``.
        webhooks: addresses that clients may have called.
    """

    dispatcher: Dispatcher
    check: RequestCheck
    keys: Keys
    secret: bytes
    started: float
    webhooks: Webhooks

    @property
    def model(self) -> str:
        """Name of the model."""
        return self.check.plan.model

    @property
    def video(self) -> bool:
        """The model makes videos."""
        return self.check.plan.facts.video

    def reload(self) -> None:
        """Read the files of keys and of LoRAs again; what cannot be read stays as it is."""
        log = self.dispatcher.log
        for name, file in (("keys", self.keys), ("LoRAs", self.check.loras)):
            try:
                log.write(f"{name} were read again", count=file.reload())
            except XditError as error:
                log.write(f"{name} could not be read again; those of before are used", "error", error=error)

    def token(self, id: str, number: int) -> str:
        """What opens one result without a key."""
        return hmac.new(self.secret, f"{id}/{number}".encode(), hashlib.sha256).hexdigest()[:32]


# what it may be is checked with the names that are allowed
AskedLoras = Annotated[
    Any, WithJsonSchema({"anyOf": [{"type": "object", "additionalProperties": {"type": "number"}}, {"type": "string"}]})
]


class Strict(BaseModel):
    """A body in which an unknown field, or a value of another type, is an error."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @field_validator("*", mode="after")
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        """Refuse half a character, which JSON can write and no file can hold."""
        if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError("it holds half a character; write whole ones")
        return value


def server_of(request: Request) -> Server:
    """The server that a request has come to."""
    server: Server = request.app.state.server
    return server


def caller_of(request: Request) -> str:
    """The name of the key of a request.

    Raises:
        ApiError: it needs a key.
    """
    name = server_of(request).keys.name_of(request.headers.get("authorization"))
    request.scope["xdit.key"] = name
    return name


async def _its_server(request: Request) -> Server:  # FastAPI sends what is not async through another thread
    return server_of(request)


async def _its_caller(request: Request) -> str:
    return caller_of(request)


AServer = Annotated[Server, Depends(_its_server)]
ACaller = Annotated[str, Depends(_its_caller)]


def check_model(server: Server, model: str | None) -> None:
    """Refuse another model than the one that is served.

    Raises:
        ApiError: it is another one.
    """
    if model is not None and model != server.model:
        raise ApiError(
            f"there is no model {model} here; write {server.model}, or leave model out.",
            404,
            "model",
            "model_not_found",
        )


def idempotency_of(request: Request) -> str | None:
    """The header ``Idempotency-Key``, None if there is none.

    Raises:
        ApiError: it is too long.
    """
    name = request.headers.get("idempotency-key")
    if name is not None and not 0 < len(name) <= LONGEST_NAME:
        raise ApiError(f"Idempotency-Key must have 1 to {LONGEST_NAME} characters.", param="Idempotency-Key")
    return name


def format_of(name: str | None, compression: int | None) -> str:
    """The format in which pictures are stored.

    Raises:
        ApiError: it is none that is known, or the compression does not fit it.
    """
    chosen = name or "png"
    if chosen not in FORMATS:
        raise ApiError(
            f"pictures are not written as {chosen}; write {', '.join(FORMATS)}.", param="output_format", code="format"
        )
    if compression is not None and chosen == "png":
        raise ApiError(
            "output_compression applies to jpeg and webp; leave it out, or choose one of these.",
            param="output_compression",
        )
    return chosen


class Attached:
    """The connection of a client that waits for a job on it: when it is released before the job has ended, the job is
    cancelled."""

    def __init__(self, server: Server) -> None:
        self._dispatcher, self._loop = server.dispatcher, asyncio.get_running_loop()
        self.watch = Watch(self._loop)
        self.job: StoredJob | None = None
        self._ended = False

    async def next(self, seconds: float) -> JobEvent | None:
        """The next event, None if nothing happens for so long."""
        event = await self.watch.next(seconds)
        self._ended = self._ended or (event is not None and event.last)
        return event

    def release(self) -> None:
        """The connection is over."""
        if self.job is not None:
            self._dispatcher.unwatch(self.job.id, self.watch)
            if not self._ended:
                reason = "the client that waited for this job has gone."
                self._loop.run_in_executor(None, self._dispatcher.cancel, self.job.id, reason)
            self.job = None


async def accept(
    server: Server,
    caller: str,
    kind: str,
    prompt: str,
    settings: Mapping[str, Any],
    *,
    body: Mapping[str, Any],
    extra: Mapping[str, Any] | None = None,
    about: Mapping[str, Any] | None = None,
    deadline_in: float | None = None,
    attached: Attached | None = None,
    **more: Any,
) -> tuple[StoredJob, bool]:
    """Check a job and store it.

    Args:
        settings: as of ``RequestCheck.check``.
        body: what the client wrote.
        extra: of the request beside prompt and settings: ``format``, ``compression``, ``previews``.
        about: of the job beside size, steps and so on.
        deadline_in: seconds from now after which nobody wants it.
        attached: the connection on which the client waits.
        more: of `NewJob`.

    Returns:
        The job, and whether it is new.
    """

    def work() -> tuple[StoredJob, bool]:
        checked: CheckedRequest = server.check.check(prompt, settings)
        new = NewJob(
            caller,
            kind,
            {"prompt": prompt, "settings": checked.settings, **(extra or {})},
            {**checked.about, "work": checked.work, **(about or {})},
            deadline=None if deadline_in is None else time.time() + deadline_in,
            digest=hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest(),
            attached=attached is not None,
            **more,
        )
        return server.dispatcher.accept(new, watch=attached.watch if attached else None)

    job, is_new = await run_in_threadpool(work)
    if attached is not None:
        attached.job = job
    return job, is_new


async def find(server: Server, caller: str, id: str, kinds: tuple[str, ...] = ()) -> StoredJob:
    """A job of a caller.

    Raises:
        ApiError: there is none.
    """
    job = await run_in_threadpool(server.dispatcher.store.find, id)
    if job is None or job.key != caller or (kinds and job.kind not in kinds):
        raise ApiError(f"there is no {kinds[0] if kinds else 'job'} {id[:40]}.", 404, code="not_found")
    return job


class EventStream(StreamingResponse):
    """An answer that goes on, with server-sent events.

    Args:
        events: as bytes.
        after: called when the connection is over, however it ends.
    """

    def __init__(self, events: AsyncIterator[bytes], after: Callable[[], None] = lambda: None) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._after = after

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._after()


async def last_event(attached: Attached, request: Request) -> JobEvent:
    """Wait for the end of a job.

    Raises:
        ApiError: the client has gone; nobody reads this.
    """
    looked = time.monotonic()
    while True:
        event = await attached.next(GLANCE)
        if event is not None and event.last:
            return event
        if time.monotonic() - looked >= GLANCE:
            looked = time.monotonic()
            if await request.is_disconnected():
                raise ApiError("the client has gone.", 499)


def failure_of(event: JobEvent) -> ApiError:
    """The error for a client whose job has not ended well."""
    message = str(event.data.get("error", "the server is ending; send the request again when it is back."))
    if event.kind == CLOSING or (event.kind == CANCELLED and "server" in message):
        return ApiError(message, 503, code="ending", retry_after=30)
    if event.kind == CANCELLED:
        return ApiError(message, 400, code="cancelled")
    return ApiError(message, 400 if event.data.get("refused") else 500, code="job_failed")


async def finished(server: Server, job: StoredJob, event: JobEvent) -> StoredJob:
    """A job that is done, with its files.

    Raises:
        ApiError: it was not done.
    """
    if event.kind != DONE:
        raise failure_of(event)
    done = await run_in_threadpool(server.dispatcher.store.find, job.id)
    if done is None:
        raise ApiError("the job was removed meanwhile; send the request again.", 404, code="not_found")
    return done


def server_event(name: str, data: Mapping[str, Any]) -> bytes:
    """A server-sent event."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


async def contents(file: StoredFile | None, missing: str) -> bytes:
    """The bytes of a file of a job.

    Raises:
        ApiError: it is not there, with the sentence ``missing``.
    """
    try:
        if file is not None:
            return await run_in_threadpool(file.path.read_bytes)
    except FileNotFoundError:
        pass
    raise ApiError(missing, 404, code="not_found")


async def file_answer(file: StoredFile | None, missing: str) -> Response:
    """A file of a job as an answer.

    Raises:
        ApiError: it is not there.
    """
    data = await contents(file, missing)
    if file is None:
        raise ApiError(missing, 404, code="not_found")
    headers = {"Cache-Control": "private, max-age=3600", "Content-Disposition": f'inline; filename="{file.path.name}"'}
    return Response(data, media_type=file.media, headers=headers)
