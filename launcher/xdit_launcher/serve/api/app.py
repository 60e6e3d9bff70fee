"""The application: all faces behind one guard, and what operators ask for."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, MutableMapping
from importlib import metadata
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from xdit_launcher.serve.api import description, errors, native, openai_api, page, videos
from xdit_launcher.serve.api.common import ACaller, AServer, Server
from xdit_launcher.serve.auth import is_loopback
from xdit_launcher.serve.limits import MIB, ApiError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
JSON_BYTES = MIB  # of a body that is no form
UNWATCHED = frozenset(("/health", "/ready", "/metrics"))  # paths that are asked all the time and not logged


def make_app(server: Server) -> FastAPI:
    """The application of a server."""
    try:
        version = metadata.version("xdit")
    except metadata.PackageNotFoundError:
        version = "0"
    app = FastAPI(title="xdit", version=version, docs_url=None, redoc_url=None)
    app.state.server = server
    for router in (native.router, description.router, openai_api.router, videos.router, page.router):
        app.include_router(router, responses=errors.documented())
    for kind, handler in (
        (ApiError, errors.on_api_error),
        (RequestValidationError, errors.on_invalid),
        (HTTPException, errors.on_http_error),
        (Exception, errors.on_unexpected),
    ):
        app.add_exception_handler(kind, handler)
    app.get("/health", tags=["operation"])(health)
    app.get("/ready", tags=["operation"], responses={503: {"description": "no ranks answer, or the server ends"}})(
        ready
    )
    about = {**errors.documented(), **errors.files("text/plain")}
    app.get("/metrics", tags=["operation"], response_class=PlainTextResponse, responses=about)(metrics)
    return app


async def health(server: AServer) -> dict[str, Any]:
    """The server answers; whether the ranks do is said by ``ready``, and by the status of ``/ready``."""
    uptime = round(time.time() - server.started, 1)
    return {"status": "ok", "model": server.model, "uptime": uptime, "ready": server.dispatcher.ready}


async def ready(server: AServer) -> Response:
    """Status 200 if the ranks answer and jobs are taken, else 503."""
    is_ready = server.dispatcher.ready
    return JSONResponse({"ready": is_ready, "model": server.model}, 200 if is_ready else 503)


async def metrics(server: AServer, caller: ACaller) -> Response:
    """Numbers for Prometheus."""
    text = await run_in_threadpool(server.dispatcher.metrics.text)
    return PlainTextResponse(text, media_type="text/plain; version=0.0.4; charset=utf-8")


class Guard:
    """Stands before the application: refuses other sites and large bodies, logs and counts every request.

    Args:
        app: what it guards.
        server: of the application.
        host: on which it listens.
    """

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], server: Server, host: str) -> None:
        self._app, self._server, self._host = app, server, host
        m = server.dispatcher.metrics
        m.counter("xdit_http_requests_total", "answers by method, route and status")
        m.histogram("xdit_http_seconds", "time until the last byte of an answer, by method and route")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, status = time.perf_counter(), 0

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-content-type-options", b"nosniff")]
            await send(message)

        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        try:
            if refusal := self._refusal(headers):
                await errors.answer_of(refusal)(scope, receive, sent)
            else:
                await self._app(scope, Limited(receive, self._most_bytes(headers)), sent)
        except Exception as error:  # the client has its answer already
            self._server.dispatcher.log.unexpected("a request failed", error, path=scope["path"])
        finally:
            self._note(scope, status, time.perf_counter() - begun)

    def _refusal(self, headers: dict[str, str]) -> ApiError | None:
        """Why a request is not let in: a page of another site that a browser shows may not use this server."""
        origin = headers.get("origin")
        try:
            host = urlsplit(f"//{headers.get('host', '')}")
            site = host.netloc if origin is None else urlsplit(origin).netloc
        except ValueError:
            return ApiError("the header Host or Origin is no address; correct it.", 400, code="host")
        if site != host.netloc:
            return ApiError("pages of other sites may not use this server.", 403, code="other_site")
        if not self._server.keys.needed and not is_loopback(host.hostname or self._host):
            return ApiError(
                f"this server answers to localhost only, not to {str(host.hostname)[:80]}; give it a key to open it.",
                403,
                code="other_host",
            )
        return None

    def _most_bytes(self, headers: dict[str, str]) -> int:
        limits = self._server.check.limits
        if headers.get("content-type", "").startswith("multipart/"):
            return int(limits.uploads * limits.upload_mib * MIB) + JSON_BYTES
        return JSON_BYTES

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", None) or "none"
        labels: dict[str, str] = {"method": scope["method"] if route != "none" else "any", "route": route}
        metrics = self._server.dispatcher.metrics
        metrics.count("xdit_http_requests_total", 1.0, status=str(status), **labels)
        metrics.observe("xdit_http_seconds", seconds, **labels)
        if scope["path"] not in UNWATCHED:
            about = {"method": scope["method"], "path": scope["path"], "status": status, "key": scope.get("xdit.key")}
            self._server.dispatcher.log.write("request", **about, seconds=round(seconds, 4))


class Limited:
    """The body of a request, which may have so many bytes.

    Args:
        receive: where it comes from.
        most: bytes.
    """

    def __init__(self, receive: Receive, most: int) -> None:
        self._receive, self._left = receive, most

    async def __call__(self) -> Message:
        """The next message.

        Raises:
            HTTPException: the body is too large.
        """
        message = await self._receive()
        if message["type"] == "http.request":
            self._left -= len(message.get("body", b""))
            if self._left < 0:
                raise HTTPException(413)
        return message
