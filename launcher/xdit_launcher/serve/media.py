"""What a gang gave, as files: PNG, JPEG, WebP, MP4, safetensors; thumbnails and sheets of videos. Without torch."""

from __future__ import annotations

import base64
import io
import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from xdit_core.outputs.metadata import FPS
from xdit_core.outputs.video import write_video
from xdit_launcher.gang.job import Picture, Result
from xdit_launcher.serve.records import NewFile

FORMATS = MappingProxyType({"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"})
THUMBNAIL, TILE = 320, 160  # pixels of the longer side of a thumbnail, and of a frame on a sheet
TILES = 16  # frames on a sheet, at most


def files_of(results: list[Result], request: Mapping[str, Any], about: Mapping[str, Any]) -> Iterator[NewFile]:
    """The files of a finished job.

    Args:
        results: of the gang.
        request: as stored: ``format``, ``compression`` and the settings.
        about: as stored: ``fps``.
    """
    pictures = [picture for result in results for picture in result.pictures]
    for number, picture in enumerate(pictures):
        if picture.video:
            yield from video_files(picture, number, about.get("fps") or FPS, request)
        else:
            name = str(request.get("format", "png"))
            data = encoded(picture.frames[0], name, request.get("compression"))
            yield NewFile("result", number, f".{name}", FORMATS[name], data, picture.seed)
    if results and results[0].trace is not None:
        yield NewFile("trace", 0, ".json", "application/json", results[0].trace)
    for number, result in enumerate(results):
        if result.latents is not None:
            yield NewFile("result", number, ".safetensors", "application/octet-stream", result.latents)


def encoded(png: bytes, name: str, compression: int | None = None) -> bytes:
    """A picture in another format.

    Args:
        png: as the ranks send it.
        name: one of ``FORMATS``; ``png`` stays as it is.
        compression: quality of JPEG and WebP from 0 to 100, by default 100.
    """
    if name == "png":
        return png
    from PIL import Image

    buffer = io.BytesIO()
    with Image.open(io.BytesIO(png)) as picture:
        quality = 100 if compression is None else compression
        picture.convert("RGB").save(buffer, name.upper(), quality=quality)
    return buffer.getvalue()


def size_of(path: Path) -> tuple[int, int]:
    """Width and height of a picture in a file."""
    from PIL import Image

    with Image.open(path) as picture:
        return picture.size


def video_files(picture: Picture, number: int, fps: int, request: Mapping[str, Any]) -> Iterator[NewFile]:
    """A video as MP4, its first frame as a small WebP, and some frames on a sheet as JPEG."""
    frames = picture.image
    with tempfile.TemporaryDirectory(prefix="xdit-") as folder:
        path = Path(folder) / "video.mp4"
        about = json.dumps({name: request[name] for name in ("prompt", "steps") if name in request})
        write_video(frames, path, fps, f"seed {picture.seed}\n{about}")
        yield NewFile("result", number, ".mp4", "video/mp4", path.read_bytes(), picture.seed)
    yield NewFile("thumbnail", number, ".webp", "image/webp", saved(smaller(frames[0], THUMBNAIL), "WEBP"))
    yield NewFile("spritesheet", number, ".jpg", "image/jpeg", saved(sheet(frames), "JPEG"))


def sheet(frames: list[Any]) -> Any:
    """Some frames of a video, evenly spread, in rows on one picture."""
    from PIL import Image

    count = min(TILES, len(frames))
    tiles = [smaller(frames[i * (len(frames) - 1) // max(1, count - 1)], TILE) for i in range(count)]
    columns = math.ceil(math.sqrt(count))
    width, height = tiles[0].size
    picture = Image.new("RGB", (columns * width, math.ceil(count / columns) * height))
    for i, tile in enumerate(tiles):
        picture.paste(tile, (i % columns * width, i // columns * height))
    return picture


def smaller(picture: Any, side: int) -> Any:
    """A picture whose longer side has at most so many pixels."""
    scale = min(1.0, side / max(picture.size))
    return picture.convert("RGB").resize([max(1, round(length * scale)) for length in picture.size])


def saved(picture: Any, name: str) -> bytes:
    """A picture as the bytes of a file."""
    buffer = io.BytesIO()
    picture.save(buffer, name, quality=85)
    return buffer.getvalue()


def base64_of(data: bytes) -> str:
    """Bytes as text."""
    return base64.b64encode(data).decode()
