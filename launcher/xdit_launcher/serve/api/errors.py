"""Errors of a request as sentences in OpenAI's shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from xdit_launcher.serve.limits import ApiError


class ErrorDetails(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of an answer with status 400 or above."""

    error: ErrorDetails


def documented() -> dict[int | str, dict[str, Any]]:
    """The document of all errors."""
    return {
        "4XX": {"model": ErrorBody, "description": "the request cannot be answered; the message says what to do"},
        "5XX": {"model": ErrorBody, "description": "the server cannot answer now"},
    }


def event_stream() -> dict[int | str, dict[str, Any]]:
    """The document of an answer that is a stream of events."""
    return {200: {"description": "events", "content": {"text/event-stream": {}}}}


def files(*kinds: str) -> dict[int | str, dict[str, Any]]:
    """The document of an answer that is a file.

    Args:
        kinds: its possible media types.
    """
    content = {kind: {"schema": {"type": "string", "format": "binary"}} for kind in kinds}
    return {200: {"description": "the file", "content": content}}


def answer_of(error: ApiError) -> Response:
    """An error as an answer."""
    return JSONResponse(error.body(), error.status, error.headers())


def refusal_of(errors: Sequence[Mapping[str, Any]], model: Any = None) -> ApiError:
    """What pydantic found, as a sentence about the first thing.

    Args:
        model: pydantic model that names the fields that exist.
    """
    first = errors[0]
    where = [part for part in first["loc"] if part not in ("body", "query", "path")]
    name = str(where[0])[:80] if where else ""
    kind, said = str(first["type"]), str(first["msg"])
    if kind in ("json_invalid", "model_attributes_type", "dict_type", "model_type") or not name:
        return ApiError(
            "the body is not a JSON object; send one, with Content-Type: application/json.", code="not_json"
        )
    if kind == "missing":
        return ApiError(f"there is no {name}; give it.", param=name, code="missing")
    if kind == "extra_forbidden":
        known = f"; known are {', '.join(model.model_fields)}" if model is not None else "; leave it out"
        return ApiError(f"there is no field {name}{known}.", param=name, code="unknown_field")
    message = said[:1].lower() + said[1:] if said.startswith(("Input", "String", "Value", "List")) else said
    return ApiError(f"{name} is wrong: {message[:200]}.", param=name, code="wrong_value")


async def on_api_error(request: Request, error: Exception) -> Response:
    """Answer with one of our own errors."""
    return answer_of(error if isinstance(error, ApiError) else ApiError(str(error), 500))


async def on_invalid(request: Request, error: Exception) -> Response:
    """Answer a request whose fields are wrong."""
    errors = error.errors() if isinstance(error, RequestValidationError) else []
    field = getattr(request.scope.get("route"), "body_field", None)
    model = getattr(getattr(field, "field_info", None), "annotation", None)
    return answer_of(refusal_of(errors, model))


async def on_http_error(request: Request, error: Exception) -> Response:
    """Answer a request that fits no route, or whose body cannot be read."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    method, path = request.method, request.url.path[:100]
    sentences = {
        404: f"there is no {method} {path}; see /openapi.json for what there is.",
        405: f"there is no {method} {path}, but there are other methods; see /openapi.json.",
        413: "the body is too large; send less.",
    }
    detail = error.detail if isinstance(error, HTTPException) else str(error)
    return answer_of(ApiError(sentences.get(status, f"the body cannot be read: {detail}."), status))


async def on_unexpected(request: Request, error: Exception) -> Response:
    """Answer where the server made a mistake; the log has the traceback."""
    return answer_of(ApiError("the server made a mistake; its log says more.", 500, code="internal"))
