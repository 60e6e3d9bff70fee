"""Our own API: a job with every setting, its state, its events, its results."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import Field

from xdit_launcher.serve.api.common import (
    KEEP_ALIVE,
    ACaller,
    AServer,
    AskedLoras,
    EventStream,
    Server,
    Strict,
    accept,
    caller_of,
    check_model,
    file_answer,
    find,
    format_of,
    idempotency_of,
    server_event,
)
from xdit_launcher.serve.api.errors import event_stream, files
from xdit_launcher.serve.events import CLOSING, JobEvent
from xdit_launcher.serve.limits import ApiError
from xdit_launcher.serve.media import FORMATS, base64_of
from xdit_launcher.serve.records import DONE, ENDED, StoredJob

KINDS = ("job", "image", "video")
SETTINGS = (
    *("negative", "steps", "guidance", "height", "width", "frames", "images", "seed", "output_type"),
    *("max_sequence_length", "call", "lora"),
)
MOST_PREVIEWS = 20
RESULT_MEDIA = (*FORMATS.values(), "video/mp4", "application/octet-stream")
router = APIRouter(prefix="/v1/jobs", tags=["jobs"])


class JobRequest(Strict):
    """A job. What is left out is the server's default."""

    prompt: str = Field(description="what to draw")
    model: str | None = Field(None, description="name of the model; only the one that is served")
    negative: str | None = Field(None, description="what to keep out of the picture")
    steps: int | None = Field(None, ge=1, description="denoising steps")
    guidance: float | None = Field(None, allow_inf_nan=False, description="classifier-free guidance scale")
    height: int | None = Field(None, ge=1, description="pixels")
    width: int | None = Field(None, ge=1, description="pixels")
    frames: int | None = Field(None, ge=1, description="frames of a video")
    images: int | None = Field(None, ge=1, description="pictures or videos")
    seed: int | Annotated[list[int], Field(min_length=1, max_length=1000)] | None = Field(
        None, description="seed of the noise, the next picture has the next one; or one for each picture"
    )
    output_type: Literal["image", "latent"] | None = Field(None, description="latent gives a safetensors file")
    max_sequence_length: int | None = Field(None, ge=0, description="the most text tokens of the T5 encoder")
    call: dict[str, bool | int | Annotated[float, Field(allow_inf_nan=False)]] | None = Field(
        None, description="arguments of the pipeline in serve.call="
    )
    lora: AskedLoras = Field(None, description="names of LoRAs of this server with scales")
    format: Literal["png", "jpeg", "webp"] | None = Field(None, description="of pictures")
    compression: int | None = Field(None, ge=0, le=100, description="quality of jpeg and webp")
    previews: int = Field(0, ge=0, le=MOST_PREVIEWS, description="previews of each picture among the events")
    priority: int = Field(0, ge=-10, le=10, description="higher ones run first")
    deadline: float | None = Field(None, gt=0, le=1e8, description="seconds from now after which nobody wants it")
    trace: bool = Field(False, description="record what every rank does and when, if the server has trace=yes")
    webhook: str | None = Field(None, description="address that is called when it has ended; of serve.webhooks")


def job_body(server: Server, job: StoredJob) -> dict[str, Any]:
    """A job as clients see it."""
    standing = {"position": None, "estimate": None, "progress": None}
    if job.status not in ENDED:
        standing = server.dispatcher.standing(job)
    about = {name: value for name, value in job.about.items() if name not in ("work", "tokens", "text_tokens")}
    written = {name: job.request.get(name) for name in ("format", "compression") if job.request.get(name) is not None}
    results = [
        {
            "number": file.number,
            "url": f"/v1/jobs/{job.id}/results/{file.number}",
            "media_type": file.media,
            "bytes": file.bytes,
            "seed": file.seed,
        }
        for file in job.results
    ]
    return {
        "id": job.id,
        "object": "job",
        "kind": job.kind,
        "status": job.status,
        **standing,
        "priority": job.priority,
        "created": job.created,
        "started": job.started,
        "ended": job.ended,
        "deadline": job.deadline,
        "prompt": job.request["prompt"],
        "settings": {**about, **job.request["settings"], **written},
        "seconds": job.seconds,
        "results": results,
        "error": None if job.error is None else {"message": job.error, "refused": job.refused},
    }


@router.post("", status_code=202, responses={200: {"description": "it was sent before; this is its job"}})
async def create(body: JobRequest, request: Request, server: AServer, caller: ACaller) -> Response:
    """Put a job in the queue; with the header ``Idempotency-Key``, sending it again gives the same job."""
    check_model(server, body.model)
    if body.trace and not server.check.plan.run.trace:
        raise ApiError(
            "this server records no traces; leave trace out, or have it started with trace=yes.",
            param="trace",
            code="unsupported",
        )
    if body.webhook is not None:
        server.webhooks.check(body.webhook)
    idempotency = idempotency_of(request)
    extra = {"format": format_of(body.format, body.compression), "compression": body.compression}
    job, is_new = await accept(
        server,
        caller,
        "job",
        body.prompt,
        {name: getattr(body, name) for name in SETTINGS},
        body=body.model_dump(),
        extra={**extra, "previews": body.previews, "trace": body.trace},
        priority=body.priority,
        deadline_in=body.deadline,
        webhook=body.webhook,
        idempotency=idempotency,
    )
    answer = await run_in_threadpool(job_body, server, job)
    return JSONResponse(answer, 202 if is_new else 200, {"Location": f"/v1/jobs/{job.id}"})


@router.get("")
async def page(
    server: AServer,
    caller: ACaller,
    status: Literal["queued", "running", "done", "failed", "cancelled"] | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: str | None = None,
) -> dict[str, Any]:
    """The jobs of this key, the newest first; ``after`` is the id of the last one of the page before."""

    def read() -> dict[str, Any]:
        jobs = server.dispatcher.store.page(caller, KINDS, status, after, limit + 1)
        data = [job_body(server, job) for job in jobs[:limit]]
        return {"object": "list", "data": data, "has_more": len(jobs) > limit}

    return await run_in_threadpool(read)


@router.get("/{id}")
async def read(id: str, server: AServer, caller: ACaller) -> dict[str, Any]:
    """A job: its status, its position in the queue, an estimate of the seconds until its end, its results."""
    return await run_in_threadpool(job_body, server, await find(server, caller, id))


@router.delete("/{id}")
async def cancel(id: str, server: AServer, caller: ACaller, purge: bool = False) -> dict[str, Any]:
    """Cancel a job; one that has ended stays as it is. With ``purge=true`` it is removed with its results too."""
    await find(server, caller, id)
    if purge:
        await run_in_threadpool(server.dispatcher.forget, id)
        return {"id": id, "object": "job.deleted", "deleted": True}
    await run_in_threadpool(server.dispatcher.cancel, id)
    return await run_in_threadpool(job_body, server, await find(server, caller, id))


@router.get("/{id}/events", response_class=StreamingResponse, responses=event_stream())
async def events(id: str, server: AServer, caller: ACaller) -> Response:
    """What happens to a job, as server-sent events, until it has ended."""
    await find(server, caller, id)
    return EventStream(told(server, id))


async def told(server: Server, id: str) -> AsyncIterator[bytes]:
    """The events of a job as bytes."""
    with server.dispatcher.watching(id, asyncio.get_running_loop()) as watch:
        while True:
            event = await watch.next(KEEP_ALIVE)
            if event is None:
                yield b": the job goes on\n\n"
                continue
            yield server_event(event.kind, await event_body(server, id, event))
            if event.last:
                return


async def event_body(server: Server, id: str, event: JobEvent) -> dict[str, Any]:
    """The data of an event; that of the last one is the whole job."""
    if event.last and event.kind != CLOSING:
        job = await run_in_threadpool(server.dispatcher.store.find, id)
        return job_body(server, job) if job else {"id": id, "status": event.kind}
    picture = {"b64_png": base64_of(event.picture)} if event.picture else {}
    return {"id": id, **event.data, **picture}


@router.get("/{id}/trace")
async def trace(id: str, server: AServer, caller: ACaller) -> Response:
    """What every rank did and when, for ui.perfetto.dev, of a job with ``trace``."""
    job = await find(server, caller, id)
    return await file_answer(job.file("trace"), f"job {id} is {job.status} and has no trace; send one with trace=true.")


@router.get("/{id}/results/{number}", response_class=Response, responses=files(*RESULT_MEDIA))
async def result(id: str, number: int, request: Request, server: AServer, token: str | None = None) -> Response:
    """A picture, video or file of latents. The address with a token, which ``response_format=url`` gives, needs no
    key."""
    if token is not None and hmac.compare_digest(token.encode(), server.token(id, number).encode()):
        job = await run_in_threadpool(server.dispatcher.store.find, id)
    else:
        job = await find(server, caller_of(request), id)
    if job is None:
        raise ApiError("there is no such job any more.", 404, code="not_found")
    why = f"job {job.id} has {len(job.results)} results, counted from 0." if job.status == DONE else f"is {job.status}"
    missing = why if job.status == DONE else f"job {job.id} {why} and has no results."
    return await file_answer(job.file("result", number), missing)
