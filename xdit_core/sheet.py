"""A contact sheet: what a run wrote, small, in one picture, each with what it shows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SIDE, GAP, LINE = 256, 8, 20  # pixels of a thumbnail, between cells, and of a caption
MOST, WIDE = 400, 16  # cells of a sheet, columns of a row that is one prompt


def contact_sheet(rows: Sequence[Sequence[Path]], captions: Sequence[str]) -> tuple[Any, list[Path]]:
    """One cell for each file, a row for each prompt if it has several files.

    Prompts with one file each, or with more than ``WIDE``, follow one another in a grid that is about square. Only one of the
    files is in memory at a time.

    Args:
        rows: files by prompt, as many of each. One that is not there, or cannot be read, leaves its cell empty.
        captions: one for each row; it stands under each of its cells.

    Returns:
        A PIL picture, and the files up to ``MOST`` whose cells are empty.
    """
    from PIL import Image, ImageDraw, ImageFont

    cells = [(path, caption) for row, caption in zip(rows, captions, strict=True) for path in row]
    shown = cells[:MOST]
    columns = len(rows[0]) if 1 < len(rows[0]) <= WIDE else math.ceil(math.sqrt(len(shown)))
    sheet = Image.new(
        "RGB", (GAP + columns * (SIDE + GAP), GAP + math.ceil(len(shown) / columns) * (SIDE + LINE + GAP)), "white"
    )
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    absent: list[Path] = []
    for i, (path, caption) in enumerate(shown):
        x, y = GAP + i % columns * (SIDE + GAP), GAP + i // columns * (SIDE + LINE + GAP)
        try:
            picture = thumbnail(path)
            sheet.paste(picture, (x + (SIDE - picture.width) // 2, y + (SIDE - picture.height) // 2))
        except Exception:  # decoders have errors of many kinds, and half a sheet is better than none
            absent.append(path)
            draw.rectangle((x, y, x + SIDE - 1, y + SIDE - 1), outline="silver")
        draw.text((x, y + SIDE + 2), shortened(caption, font), fill="black", font=font)
    return sheet, absent


def thumbnail(path: Path) -> Any:
    """A picture, or the frame in the middle of a video, at most ``SIDE`` a side."""
    from PIL import Image

    if not path.is_file():  # a pipe would be waited for
        raise FileNotFoundError(path)

    if path.suffix.lower() == ".mp4":
        from xdit_core.video import middle_frame

        picture = middle_frame(path)
    else:
        with Image.open(path) as file:
            picture = file.convert("RGB")
    scale = SIDE / max(picture.size)
    return picture.resize([max(1, round(side * scale)) for side in picture.size], Image.Resampling.LANCZOS)


def shortened(text: str, font: Any, width: int = SIDE) -> str:
    """As much of a text as fits under a thumbnail, or into so many pixels."""
    text = " ".join(text[: 4 * width].split())  # no more can fit, and each try measures all that is left
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"
