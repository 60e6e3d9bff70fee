"""OpenAI's API of videos: a job that is made, looked after, fetched and deleted."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response
from pydantic import Field, ValidationError

from xdit_core.outputs.metadata import FPS
from xdit_launcher.serve.api.common import (
    ACaller,
    AServer,
    AskedLoras,
    Server,
    Strict,
    accept,
    check_model,
    file_answer,
    find,
    idempotency_of,
)
from xdit_launcher.serve.api.errors import files, refusal_of
from xdit_launcher.serve.api.openai_api import size_of
from xdit_launcher.serve.api.uploads import form_of, forms
from xdit_launcher.serve.limits import ApiError
from xdit_launcher.serve.records import DONE, ENDED, RUNNING, StoredJob

KINDS = ("video",)
POLL_MS = 1000  # how often a client should ask
LONGEST_POLL_MS = 10_000
router = APIRouter(prefix="/v1/videos", tags=["openai"])


class VideoRequest(Strict):
    """A video, with the fields of OpenAI's API and some of our own: ``frames``, ``seed``, ``steps``, ``guidance``,
    ``negative``. A form gives all of them as text, so numbers are read from text here."""

    model_config = Strict.model_config | {"strict": False}

    prompt: str = Field(description="what to draw")
    model: str | None = Field(None, description="name of the model; only the one that is served")
    seconds: float | None = Field(None, gt=0, le=3600, allow_inf_nan=False, description="length of the video")
    size: str | None = Field(None, description="auto, or WIDTHxHEIGHT in pixels")
    frames: int | None = Field(None, ge=1, description="ours: number of frames, in place of seconds")
    seed: int | None = Field(None, description="ours: seed of the noise")
    steps: int | None = Field(None, ge=1, description="ours: denoising steps")
    guidance: float | None = Field(None, allow_inf_nan=False, description="ours: classifier-free guidance scale")
    negative: str | None = Field(None, description="ours: what to keep out of the video")
    lora: AskedLoras = Field(None, description="ours: names of LoRAs of this server with scales")


def check_video(server: AServer) -> Server:
    """Refuse everything about videos if the model makes pictures.

    Raises:
        ApiError: it does.
    """
    if not server.video:
        raise ApiError(
            f"{server.model} makes pictures and no videos; use /v1/images/generations.",
            code="unsupported",
            param="model",
        )
    return server


async def body_of(request: Request, server: Server) -> VideoRequest:
    """The body of a request for a video: a form, as the official client sends it, or JSON.

    Raises:
        ApiError: a field is wrong, or there is a picture to begin with.
    """
    if request.headers.get("content-type", "").startswith("application/json"):
        values: Any = await request.body()
    else:
        form = await form_of(request, server.check.limits)
        if "input_reference" in form:
            raise ApiError(
                f"{server.model} makes videos from text only; leave out input_reference.",
                param="input_reference",
                code="unsupported",
            )
        values = dict(form)
    try:
        return VideoRequest.model_validate_json(values) if isinstance(values, bytes) else VideoRequest(**values)
    except ValidationError as error:
        raise refusal_of(error.errors(), VideoRequest) from error


def frames_of(server: Server, body: VideoRequest) -> int | None:
    """The number of frames that a request asks for: as many as the model can make that come nearest to the seconds.

    Raises:
        ApiError: both frames and seconds are given.
    """
    if body.seconds is None:
        return body.frames
    if body.frames is not None:
        raise ApiError("seconds and frames both say how long the video is; give one of them.", param="seconds")
    plan = server.check.plan
    unit = plan.facts.frame_step
    wanted = body.seconds * (plan.run.fps or FPS)
    offset = (plan.run.frames or 1) % unit  # models count either 4k + 1 frames or 4k
    return max(1, round((wanted - offset) / unit) * unit + offset)


@router.post("", response_model=None, openapi_extra=forms(schema=VideoRequest.model_json_schema()))
async def create(request: Request, server: AServer, caller: ACaller) -> Any:
    """Put a video in the queue."""
    check_video(server)
    body = await body_of(request, server)
    check_model(server, body.model)
    width, height = size_of(body.size)
    settings = {
        **{"width": width, "height": height, "frames": frames_of(server, body), "seed": body.seed},
        **{"steps": body.steps, "guidance": body.guidance, "negative": body.negative, "lora": body.lora},
    }
    idempotency = idempotency_of(request)
    job, _ = await accept(
        server, caller, "video", body.prompt, settings, body=body.model_dump(), idempotency=idempotency
    )
    return await run_in_threadpool(video_body, server, job)


def video_body(server: Server, job: StoredJob) -> dict[str, Any]:
    """A job as OpenAI's clients see a video."""
    status = {"queued": "queued", RUNNING: "in_progress", DONE: "completed"}.get(job.status, "failed")
    progress = 100 if job.status == DONE else 0
    if job.status == RUNNING:
        known = server.dispatcher.standing(job)["progress"]
        progress = min(99, round(100 * known["fraction"])) if known else 0
    about = job.about
    code = "cancelled" if job.status == "cancelled" else "job_failed"
    return {
        "id": job.id,
        "object": "video",
        "created_at": int(job.created),
        "completed_at": None if job.ended is None else int(job.ended),
        "expires_at": None if job.ended is None else int(job.ended + server.check.limits.results_days * 86400),
        "status": status,
        "progress": progress,
        "model": server.model,
        "prompt": job.request["prompt"],
        "seconds": f"{(about['frames'] or 1) / (about['fps'] or FPS):g}",
        "size": f"{about['width']}x{about['height']}",
        "seed": job.request["settings"]["seed"],
        "error": None if job.error is None else {"code": code, "message": job.error},
        "remixed_from_video_id": None,
    }


@router.get("")
async def page(
    server: AServer,
    caller: ACaller,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: str | None = None,
    order: Literal["asc", "desc"] = "desc",
) -> dict[str, Any]:
    """The videos of this key."""
    check_video(server)

    def read() -> dict[str, Any]:
        jobs = server.dispatcher.store.page(caller, KINDS, None, after, limit + 1, order == "asc")
        data = [video_body(server, job) for job in jobs[:limit]]
        ends = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
        return {"object": "list", "data": data, **ends, "has_more": len(jobs) > limit}

    return await run_in_threadpool(read)


@router.get("/{id}")
async def read(id: str, server: AServer, caller: ACaller) -> Response:
    """A video, with its true progress, and after how many milliseconds to ask again."""
    check_video(server)
    job = await find(server, caller, id, KINDS)
    body = await run_in_threadpool(video_body, server, job)
    estimate = None if job.status in ENDED else server.dispatcher.standing(job)["estimate"]
    wait = POLL_MS if estimate is None else max(200, min(LONGEST_POLL_MS, round(250 * estimate)))
    return JSONResponse(body, headers={"openai-poll-after-ms": str(wait)})


@router.delete("/{id}")
async def delete(id: str, server: AServer, caller: ACaller) -> dict[str, Any]:
    """Stop a video if it is drawn, and remove it."""
    check_video(server)
    await find(server, caller, id, KINDS)
    await run_in_threadpool(server.dispatcher.forget, id)
    return {"id": id, "object": "video.deleted", "deleted": True}


@router.get("/{id}/content", response_class=Response, responses=files("video/mp4", "image/webp", "image/jpeg"))
async def content(
    id: str,
    server: AServer,
    caller: ACaller,
    variant: Literal["video", "thumbnail", "spritesheet"] = "video",
) -> Response:
    """The video as MP4, a small picture of its beginning, or a sheet with some of its frames."""
    check_video(server)
    job = await find(server, caller, id, KINDS)
    role = "result" if variant == "video" else variant
    return await file_answer(job.file(role), f"video {id} is {job.status} and has no {variant}.")


@router.post("/{id}/remix")
async def remix(id: str, server: AServer, caller: ACaller) -> Response:
    """Refused: no model that is served takes a video."""
    check_video(server)
    raise ApiError(f"{server.model} makes videos from text only; use /v1/videos.", code="unsupported")
