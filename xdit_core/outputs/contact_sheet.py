"""The contact sheet: one picture that shows the results of a run as thumbnails with captions."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from xdit_core.outputs.fonts import Fonts

SIDE, GAP, LINE = 256, 8, 20  # pixels of a thumbnail, between cells, and of a caption
MOST, WIDE = 400, 16  # cells of a sheet, columns of a row that is one prompt


def contact_sheet(
    rows: Sequence[Sequence[Path]], captions: Sequence[str], seeds: Sequence[int] = (), fonts: Fonts | None = None
) -> tuple[Any, list[Path]]:
    """Draw a cell for each file; a prompt with several files has a row of its own.

    If each prompt has one file, or more than ``WIDE``, the cells form a grid that is about square. Only one file is in
    memory at a time.

    Args:
        rows: files of each prompt, the same number for all. A file that cannot be read leaves its cell empty.
        captions: one for each row, written under each of its cells. If no font can show it, the name of the file is
            written.
        seeds: one for each column, written too where captions of a row would be equal.
        fonts: fonts for the captions; None uses the installed ones.

    Returns:
        A PIL picture, and those of the first ``MOST`` files whose cells are empty.
    """
    from PIL import Image, ImageDraw

    fonts = fonts or Fonts(13)
    cells = list(cells_of(rows, captions, seeds))
    shown = cells[:MOST]
    columns = len(rows[0]) if 1 < len(rows[0]) <= WIDE else math.ceil(math.sqrt(len(shown)))
    sheet = Image.new(
        "RGB", (GAP + columns * (SIDE + GAP), GAP + math.ceil(len(shown) / columns) * (SIDE + LINE + GAP)), "white"
    )
    draw = ImageDraw.Draw(sheet)
    absent: list[Path] = []
    for i, (path, seed, caption) in enumerate(shown):
        x, y = GAP + i % columns * (SIDE + GAP), GAP + i // columns * (SIDE + LINE + GAP)
        try:
            picture = thumbnail(path)
            sheet.paste(picture, (x + (SIDE - picture.width) // 2, y + (SIDE - picture.height) // 2))
        except Exception:  # decoders have errors of many kinds, and half a sheet is better than none
            absent.append(path)
            draw.rectangle((x, y, x + SIDE - 1, y + SIDE - 1), outline="silver")
        words = fonts.shown(seed + (caption if fonts.legible(caption) else path.name))
        fonts.write(draw, (x, y + SIDE + 2 + fonts.size), shortened(words, fonts), fill="black")
    return sheet, absent


def cells_of(
    rows: Sequence[Sequence[Path]], captions: Sequence[str], seeds: Sequence[int]
) -> Iterator[tuple[Path, str, str]]:
    """List each file with its caption, and with its seed where captions are equal.

    The seed comes first, because the end of a long caption is cut off."""
    counts = Counter(caption for row, caption in zip(rows, captions, strict=True) for _ in row)
    for row, caption in zip(rows, captions, strict=True):
        for i, path in enumerate(row):
            tells = counts[caption] > 1 and i < len(seeds)
            yield path, f"seed {seeds[i]}: " if tells else "", caption[: 4 * SIDE]


def thumbnail(path: Path) -> Any:
    """Read a picture, or the middle frame of a video, and shrink it to at most ``SIDE`` pixels a side."""
    from PIL import Image

    if not path.is_file():  # a pipe would be waited for
        raise FileNotFoundError(path)

    if path.suffix.lower() == ".mp4":
        from xdit_core.outputs.video import middle_frame

        picture = middle_frame(path)
    else:
        with Image.open(path) as file:
            picture = file.convert("RGB")
    scale = SIDE / max(picture.size)
    return picture.resize([max(1, round(side * scale)) for side in picture.size], Image.Resampling.LANCZOS)


def shortened(text: str, font: Any, width: int = SIDE) -> str:
    """Cut a text so that it fits under a thumbnail, or into a number of pixels."""
    text = " ".join(text[: 4 * width].split())  # no more can fit, and each try measures all that is left
    if font.getlength(text) <= width:
        return text
    fits = bisect_left(range(len(text)), True, key=lambda n: font.getlength(text[: n + 1] + "…") > width)
    return text[:fits].rstrip() + "…"
