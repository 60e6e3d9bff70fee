"""Render Noto Color Emoji to pictures with names: the training set of the emoji model.

Source: Debian's ``fonts-noto-color-emoji`` (glyph bitmaps, SIL Open Font License 1.1, Google Inc.) and
``unicode-data`` (names from ``emoji-test.txt``, Unicode Consortium).

    python -m xdit_emoji.training.data --out build/emoji
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
NAMES = "/usr/share/unicode/emoji/emoji-test.txt"
BITMAP_SIZE = 109  # the one size for which the font carries bitmaps (136 x 128 pixels)
SIDE = 128
SKIPPED_GROUPS = ("Component", "Flags")


@dataclass(frozen=True)
class Emoji:
    """One character sequence of emoji-test.txt."""

    text: str
    name: str
    group: str


def read_names(path: str = NAMES) -> list[Emoji]:
    """Every fully-qualified emoji that is no flag, has no skin tone and no gender variant."""
    found, group = [], ""
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        if line.startswith("# group: "):
            group = line.removeprefix("# group: ")
            continue
        match = re.match(r"([0-9A-F ]+?)\s*; fully-qualified\s*# \S+ E[\d.]+ (.*)", line)
        if not match or group in SKIPPED_GROUPS:
            continue
        text = "".join(chr(int(code, 16)) for code in match[1].split())
        name = match[2].lower().replace("’", "'").replace("“", "").replace("”", "")
        if "skin tone" in name or ("‍" in text and group == "People & Body"):
            continue
        found.append(Emoji(text, name, group))
    return found


def render(text: str, font: ImageFont.FreeTypeFont) -> Image.Image | None:
    """The glyph centred on white, ``SIDE`` x ``SIDE`` pixels; None if the font has no single glyph for it."""
    canvas = Image.new("RGBA", (320, 200), (255, 255, 255, 0))
    if font.getlength(text) > 1.3 * BITMAP_SIZE + 30:
        return None  # several glyphs side by side: the font lacks the sequence
    ImageDraw.Draw(canvas).text((40, 20), text, font=font, embedded_color=True)
    box = canvas.getbbox()
    if box is None:
        return None
    glyph = canvas.crop(box)
    glyph.thumbnail((SIDE - 8, SIDE - 8), Image.Resampling.LANCZOS)
    picture = Image.new("RGB", (SIDE, SIDE), "white")
    picture.paste(glyph, ((SIDE - glyph.width) // 2, (SIDE - glyph.height) // 2), glyph)
    return picture


def load(chosen: set[str] | None = None) -> tuple[list[str], torch.Tensor]:
    """Names and pictures.

    Args:
        chosen: keep only these names; a name that is not in the list is an error. None keeps all.

    Returns:
        The names and a uint8 tensor ``[len(names), 3, SIDE, SIDE]``.

    Raises:
        ValueError: ``chosen`` has a name for which there is no picture.
    """
    font = ImageFont.truetype(FONT, BITMAP_SIZE)
    names, pictures = [], []
    for emoji in read_names():
        if chosen is not None and emoji.name not in chosen:
            continue
        picture = render(emoji.text, font)
        if picture is not None and emoji.name not in names:
            names.append(emoji.name)
            pictures.append(torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(SIDE, SIDE, 3))
    missing = sorted((chosen or set()) - set(names))
    if missing:
        raise ValueError(f"no picture for {', '.join(missing)}; take names from {NAMES}")
    return names, torch.stack(pictures).permute(0, 3, 1, 2).contiguous()


def chosen_names(path: str | Path | None = None) -> set[str]:
    """The names in ``names.txt`` beside this file (or in ``path``), one a line."""
    path = Path(path) if path else Path(__file__).with_name("names.txt")
    return {line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()}


def to_float(pictures: torch.Tensor) -> torch.Tensor:
    """uint8 pictures to float in [-1, 1]."""
    return pictures.float() / 127.5 - 1


def sheet(pictures: torch.Tensor, columns: int = 20) -> Image.Image:
    """A contact sheet of uint8 pictures ``[n, 3, h, w]``."""
    n, _, height, width = pictures.shape
    rows = -(-n // columns)
    out = Image.new("RGB", (columns * width, rows * height), "white")
    for i, picture in enumerate(pictures):
        out.paste(Image.fromarray(picture.permute(1, 2, 0).numpy()), (i % columns * width, i // columns * height))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="build/emoji", help="folder for data.pt and sheet.png")
    out = Path(parser.parse_args().out)
    out.mkdir(parents=True, exist_ok=True)
    names, pictures = load()
    torch.save({"names": names, "pictures": pictures}, out / "data.pt")
    sheet(pictures[:, :, ::2, ::2], 40).save(out / "sheet.png")
    print(f"{len(names)} pictures of {SIDE}x{SIDE} in {out / 'data.pt'}")


if __name__ == "__main__":
    main()
