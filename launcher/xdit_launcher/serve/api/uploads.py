"""Forms with files: how many, how large, and whether each picture is one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import python_multipart  # noqa: F401  starlette reads forms with it, and says so only when one comes
from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile

from xdit_launcher.serve.api.common import MULTIPART
from xdit_launcher.serve.limits import MIB, ApiError, ServeSettings, check_picture

FIELDS = 50  # of a form, at most


def forms(*pictures: str, schema: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The document of a body that is a form.

    Args:
        pictures: names of fields that take files.
        schema: of all other fields; such a body may be JSON too.
    """
    properties = {name: {"type": "string", "format": "binary"} for name in pictures}
    form = schema or {"type": "object", "properties": {**properties, "prompt": {"type": "string"}}}
    content = {MULTIPART: {"schema": form}} | ({} if schema is None else {"application/json": {"schema": schema}})
    return {"requestBody": {"required": True, "content": content}}


async def form_of(request: Request, limits: ServeSettings) -> FormData:
    """Read a form.

    Raises:
        ApiError: the body is no form, or has too many files.
    """
    if not request.headers.get("content-type", "").startswith(MULTIPART):
        raise ApiError(f"the body must be a form; send it as {MULTIPART}.", 415, code="not_a_form")
    return await request.form(max_files=limits.uploads, max_fields=FIELDS)


async def picture_fields(form: FormData, names: Sequence[str], limits: ServeSettings) -> list[tuple[str, bytes]]:
    """The uploaded pictures of some fields, each checked; ``image`` is also written ``image[]``.

    Raises:
        ApiError: one is missing, too large, damaged, or of another kind.
    """
    pictures = []
    for name, value in form.multi_items():
        plain = name.removesuffix("[]")
        if isinstance(value, UploadFile):
            if plain not in names:
                raise ApiError(f"there is no field {name} for a file; write {', '.join(names)}.", param=name)
            data = await value.read(int(limits.upload_mib * MIB) + 1)
            await run_in_threadpool(check_picture, data, plain, limits)
            pictures.append((plain, data))
        elif plain in names:
            raise ApiError(f"{plain} is text; upload a PNG, JPEG or WebP file.", param=plain)
    if not any(plain == names[0] for plain, _ in pictures):
        raise ApiError(f"there is no {names[0]}; upload a PNG, JPEG or WebP file.", param=names[0])
    return pictures
