"""The page ``/``: files that hold no data and need no key. Everything else the page asks of our own API."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

from fastapi import APIRouter
from fastapi.responses import FileResponse, Response

from xdit_launcher.serve.limits import ApiError

FOLDER = Path(__file__).parents[1] / "page"
MEDIA = MappingProxyType(
    {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
)  # suffix to media type; no other file is sent
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob: data:",
        "media-src 'self' blob:",
        "connect-src 'self'",
        *("base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"),
        "require-trusted-types-for 'script'",
    )
)
HEADERS = MappingProxyType(
    {"Content-Security-Policy": POLICY, "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}
)
FILES = MappingProxyType({path.name: path for path in FOLDER.iterdir() if path.suffix in MEDIA})
router = APIRouter(include_in_schema=False)


@router.get("/")
async def index() -> Response:
    """The page."""
    return file_of("index.html")


@router.get("/page/{name}")
async def part(name: str) -> Response:
    """A script, style or picture of the page."""
    return file_of(name)


def file_of(name: str) -> Response:
    """A file of the page.

    Raises:
        ApiError: there is none of that name.
    """
    path = FILES.get(name)
    if path is None:
        raise ApiError(f"the page has no file {name[:80]}.", 404, code="not_found")
    return FileResponse(path, media_type=f"{MEDIA[path.suffix]}; charset=utf-8", headers=HEADERS)
