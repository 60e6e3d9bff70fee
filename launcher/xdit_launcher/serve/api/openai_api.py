"""OpenAI's API of pictures, as their official client uses it: generations, edits, models."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from types import MappingProxyType
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from xdit_launcher.serve.api.common import (
    KEEP_ALIVE,
    ACaller,
    AServer,
    AskedLoras,
    Attached,
    EventStream,
    Server,
    Strict,
    accept,
    check_model,
    contents,
    finished,
    format_of,
    last_event,
    server_event,
)
from xdit_launcher.serve.api.errors import event_stream
from xdit_launcher.serve.api.uploads import form_of, forms, picture_fields
from xdit_launcher.serve.events import JobEvent
from xdit_launcher.serve.limits import ApiError
from xdit_launcher.serve.media import base64_of, encoded
from xdit_launcher.serve.records import StoredJob

# What a quality means: the number of steps, as a part of the model's default, and the name that an answer gives it.
QUALITIES = MappingProxyType(
    {
        "low": (0.5, "low"),
        "medium": (1.0, "medium"),
        "auto": (1.0, "medium"),
        "standard": (1.0, "medium"),
        "high": (1.5, "high"),
        "hd": (1.5, "high"),
        "xhigh": (2.0, "xhigh"),
        "max": (3.0, "max"),
    }
)
SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")
MOST_PARTIAL = 3
router = APIRouter(prefix="/v1", tags=["openai"])


class ImageRequest(Strict):
    """Pictures, with the fields of OpenAI's API and of our own ``seed``, ``steps``, ``guidance``, ``negative``."""

    prompt: str = Field(description="what to draw")
    model: str | None = Field(None, description="name of the model; only the one that is served")
    n: int | None = Field(None, ge=1, description="number of pictures")
    size: str | None = Field(None, description="auto, or WIDTHxHEIGHT in pixels")
    quality: str | None = Field(None, description="how many steps: low, medium, high, xhigh, max or auto")
    output_format: str | None = Field(None, description="png, jpeg or webp")
    output_compression: int | None = Field(None, ge=0, le=100, description="quality of jpeg and webp")
    background: str | None = Field(None, description="auto or opaque")
    response_format: str | None = Field(None, description="b64_json or url")
    stream: bool | None = Field(None, description="send events while the picture is drawn")
    partial_images: int | None = Field(
        None, ge=0, le=MOST_PARTIAL, description="previews of each picture in the stream"
    )
    moderation: str | None = Field(None, description="auto or low; this server filters nothing")
    user: str | None = Field(None, max_length=512, description="kept with the job")
    safety_identifier: str | None = Field(None, max_length=512, description="kept with the job")
    style: str | None = Field(None, description="refused: describe the style in the prompt")
    complexity: str | None = Field(None, description="refused: the steps are all that there is to spend")
    frame_count: int | None = Field(None, description="refused: this server writes no GIF")
    frame_duration_ms: int | None = Field(None, description="refused: this server writes no GIF")
    svg: dict[str, Any] | None = Field(None, description="refused: this server draws pixels")
    seed: int | Annotated[list[int], Field(min_length=1, max_length=1000)] | None = Field(
        None, description="ours: seed of the noise, the next picture has the next one; by default a random one"
    )
    steps: int | None = Field(None, ge=1, description="ours: denoising steps, in place of quality")
    guidance: float | None = Field(None, allow_inf_nan=False, description="ours: classifier-free guidance scale")
    negative: str | None = Field(None, description="ours: what to keep out of the picture")
    lora: AskedLoras = Field(None, description="ours: names of LoRAs of this server with scales")


def check_fields(server: Server, body: ImageRequest) -> None:
    """Refuse the fields of OpenAI's API that this server cannot honour.

    Raises:
        ApiError: with a sentence.
    """
    if server.video:
        raise ApiError(f"{server.model} makes videos; use /v1/videos.", param="model", code="unsupported")
    check_model(server, body.model)
    if body.background == "transparent":
        raise ApiError(
            f"{server.model} draws opaque pictures; write background=opaque, or leave it out.", param="background"
        )
    refused = {
        "style": "there is no style here; describe it in the prompt.",
        "complexity": "there is no complexity here; write quality or steps.",
        "frame_count": "this server writes no GIF; leave frame_count out.",
        "frame_duration_ms": "this server writes no GIF; leave frame_duration_ms out.",
        "svg": "this server draws pixels and no SVG; leave svg out.",
    }
    for name, sentence in refused.items():
        if getattr(body, name) is not None:
            raise ApiError(sentence, param=name, code="unsupported")
    choices = {
        "background": ("auto", "opaque"),
        "response_format": ("b64_json", "url"),
        "moderation": ("auto", "low"),
        "quality": tuple(QUALITIES),
    }
    for name, values in choices.items():
        value = getattr(body, name)
        if value is not None and value not in values:
            raise ApiError(f"{name}={value[:40]} is not known; write {', '.join(values)}.", param=name)
    if body.steps is not None and body.quality not in (None, "auto"):
        raise ApiError("steps and quality both say how many steps; give one of them.", param="steps")
    if body.partial_images and not body.stream:
        raise ApiError("partial_images are sent in a stream; add stream=true.", param="partial_images")
    if body.stream and body.response_format == "url":
        raise ApiError("a stream carries pictures as b64_json; leave response_format out.", param="response_format")


def size_of(text: str | None) -> tuple[int | None, int | None]:
    """Width and height of a text such as ``1024x768``, None for both if the model's default is meant.

    Raises:
        ApiError: it is no size.
    """
    if text in (None, "auto"):
        return None, None
    match = SIZE.fullmatch(text or "")
    if match is None:
        raise ApiError(f"size={str(text)[:40]} is no size; write auto, or for example 1024x1024.", param="size")
    return int(match[1]), int(match[2])


def steps_of(server: Server, body: ImageRequest) -> int | None:
    """The steps that a request asks for, None for the model's default."""
    if body.steps is not None or body.quality is None:
        return body.steps
    usual = server.check.plan.run.steps
    return None if usual is None else max(1, round(usual * QUALITIES[body.quality][0]))


@router.post("/images/generations", response_model=None, responses=event_stream())
async def generate(body: ImageRequest, request: Request, server: AServer, caller: ACaller) -> Any:
    """Draw pictures and wait for them; a client that goes away cancels the job."""
    check_fields(server, body)
    width, height = size_of(body.size)
    chosen = format_of(body.output_format, body.output_compression)
    settings = {
        **{"width": width, "height": height, "steps": steps_of(server, body), "guidance": body.guidance},
        **{"negative": body.negative, "seed": body.seed, "images": body.n, "lora": body.lora},
    }
    if isinstance(body.seed, list) and body.n is not None and len(body.seed) not in (1, body.n):
        raise ApiError("seed has another number of seeds than n; give one for each picture.", param="seed")
    attached = Attached(server)
    job, _ = await accept(
        server,
        caller,
        "image",
        body.prompt,
        settings,
        body=body.model_dump(),
        extra={
            **{"format": chosen, "compression": body.output_compression, "previews": body.partial_images or 0},
            "user": body.safety_identifier or body.user,
        },
        about={"quality": QUALITIES[body.quality or "auto"][1]},
        attached=attached,
    )
    if body.stream:
        return EventStream(streamed(server, job, attached), attached.release)
    try:
        done = await finished(server, job, await last_event(attached, request))
    finally:
        attached.release()
    data = await run_in_threadpool(data_of, server, done, body.response_format, str(request.base_url))
    usage = usage_of(done, len(done.results))
    return JSONResponse({"created": int(done.created), "job": done.id, **described(done), "data": data, "usage": usage})


def data_of(server: Server, job: StoredJob, form: str | None, base: str) -> list[dict[str, Any]]:
    """The pictures of an answer: as text, or as addresses that need no key."""
    if form == "url":
        address = f"{base}v1/jobs/{job.id}/results/"
        tokens = [(file, server.token(job.id, file.number)) for file in job.results]
        return [{"url": f"{address}{file.number}?token={token}", "seed": file.seed} for file, token in tokens]
    return [{"b64_json": base64_of(file.path.read_bytes()), "seed": file.seed} for file in job.results]


def described(job: StoredJob) -> dict[str, Any]:
    """What an answer says of its pictures."""
    return {
        "background": "opaque",
        "output_format": job.request["format"],
        "quality": job.about["quality"],
        "size": f"{job.about['width']}x{job.about['height']}",
    }


def usage_of(job: StoredJob, pictures: int) -> dict[str, Any]:
    """Tokens that went through the blocks of the model: of the text once, of each picture those that it consists of."""
    text, image = int(job.about["text_tokens"]), int(job.about["tokens"]) * pictures
    return {
        "input_tokens": text,
        "output_tokens": image,
        "total_tokens": text + image,
        "input_tokens_details": {"text_tokens": text, "image_tokens": 0},
        "output_tokens_details": {"text_tokens": 0, "image_tokens": image},
    }


async def streamed(server: Server, job: StoredJob, attached: Attached) -> AsyncIterator[bytes]:
    """The events of a job in OpenAI's form."""
    count = 0
    while True:
        event = await attached.next(KEEP_ALIVE)
        if event is None:
            yield b": the job goes on\n\n"
        elif event.kind == "preview":
            yield await partial_image(job, event, count)
            count += 1
        elif event.last:
            break
    try:
        done = await finished(server, job, event)
        for file in done.results:
            data = await contents(file, "the result is gone.")
            yield server_event(
                "image_generation.completed",
                {
                    **{"type": "image_generation.completed", "b64_json": base64_of(data), "seed": file.seed},
                    **{"created_at": int(done.created), "job": done.id, **described(done), "usage": usage_of(done, 1)},
                    "safety_identifier": done.request.get("user"),
                },
            )
    except ApiError as error:
        yield server_event("error", error.body())


async def partial_image(job: StoredJob, event: JobEvent, index: int) -> bytes:
    """A preview in OpenAI's form."""
    form, compression = str(job.request["format"]), job.request["compression"]
    data = await asyncio.to_thread(encoded, event.picture, form, compression)
    name = "image_generation.partial_image"
    about = {"type": name, "b64_json": base64_of(data), "created_at": int(job.created), "partial_image_index": index}
    return server_event(name, {**about, **described(job)})


@router.post("/images/edits", openapi_extra=forms("image", "mask"))
async def edit(request: Request, server: AServer, caller: ACaller) -> Response:
    """Check an edit of pictures, and refuse it: no model that is served takes pictures yet."""
    form = await form_of(request, server.check.limits)
    await picture_fields(form, ("image", "mask"), server.check.limits)
    model = form.get("model")
    check_model(server, model if isinstance(model, str) else None)
    raise ApiError(
        f"{server.model} draws from text only and takes no picture; use /v1/images/generations.",
        param="image",
        code="unsupported",
    )


@router.post("/images/variations")
async def vary(server: AServer, caller: ACaller) -> Response:
    """Refused: no model that is served takes pictures yet."""
    raise ApiError(
        f"{server.model} draws from text only and takes no picture; use /v1/images/generations.",
        param="image",
        code="unsupported",
    )


def model_body(server: Server) -> dict[str, Any]:
    """The model as OpenAI's clients see it."""
    return {"id": server.model, "object": "model", "created": int(server.started), "owned_by": "xdit"}


@router.get("/models")
async def models(server: AServer, caller: ACaller) -> dict[str, Any]:
    """The model that is served."""
    return {"object": "list", "data": [model_body(server)]}


@router.get("/models/{id}")
async def model_named(id: str, server: AServer, caller: ACaller) -> dict[str, Any]:
    """The model that is served, by its name."""
    check_model(server, id)
    return model_body(server)
