"""A contact sheet: what a run wrote, small, in one picture, each with what it shows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SIDE, GAP, LINE = 256, 8, 20  # pixels of a thumbnail, between cells, and of a caption
MOST = 400  # cells


def contact_sheet(rows: Sequence[Sequence[Path]], captions: Sequence[str]) -> tuple[Any, list[Path]]:
    """One cell for each file, a row for each prompt if it has several files.

    Args:
        rows: files by prompt. A file that is not there, or cannot be read, leaves its cell empty.
        captions: one for each row.

    Returns:
        A PIL picture, and the files that are not on it.
    """
    from PIL import Image, ImageDraw, ImageFont

    cells = [(path, caption) for row, caption in zip(rows, captions, strict=True) for path in row]
    shown = cells[:MOST]
    columns = len(rows[0]) if len(rows[0]) > 1 else math.ceil(math.sqrt(len(shown)))
    sheet = Image.new(
        "RGB", (GAP + columns * (SIDE + GAP), GAP + math.ceil(len(shown) / columns) * (SIDE + LINE + GAP)), "white"
    )
    draw, font, absent = ImageDraw.Draw(sheet), ImageFont.load_default(size=13), [path for path, _ in cells[MOST:]]
    for i, (path, caption) in enumerate(shown):
        x, y = GAP + i % columns * (SIDE + GAP), GAP + i // columns * (SIDE + LINE + GAP)
        try:
            picture = thumbnail(path)
            sheet.paste(picture, (x + (SIDE - picture.width) // 2, y + (SIDE - picture.height) // 2))
        except (OSError, ValueError):
            absent.append(path)
            draw.rectangle((x, y, x + SIDE - 1, y + SIDE - 1), outline="silver")
        draw.text((x, y + SIDE + 2), shortened(caption, font), fill="black", font=font)
    return sheet, absent


def thumbnail(path: Path) -> Any:
    """A picture, or the frame in the middle of a video, at most ``SIDE`` a side."""
    from PIL import Image

    if path.suffix.lower() == ".mp4":
        from xdit_core.video import middle_frame

        picture = middle_frame(path)
    else:
        with Image.open(path) as file:
            picture = file.convert("RGB")
    scale = SIDE / max(picture.size)
    return picture.resize([max(1, round(side * scale)) for side in picture.size], Image.Resampling.LANCZOS)


def shortened(text: str, font: Any) -> str:
    """As much of a text as fits under a thumbnail."""
    text = " ".join(text.split())
    if font.getlength(text) <= SIDE:
        return text
    while text and font.getlength(text + "…") > SIDE:
        text = text[:-1]
    return text.rstrip() + "…"
