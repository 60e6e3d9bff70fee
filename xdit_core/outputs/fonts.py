"""Fonts for captions: each character is drawn with an installed font that has it. Without torch."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

# Where systems keep their fonts, and how the names of files begin that hold many characters, the best first.
FOLDERS = (
    "/usr/share/fonts",
    "/usr/local/share/fonts",
    "~/.local/share/fonts",
    "~/.fonts",
    "/System/Library/Fonts",
    "/Library/Fonts",
    "~/Library/Fonts",
    "C:/Windows/Fonts",
)
FAMILIES = (
    *("NotoSans-Regular", "DejaVuSans.", "LiberationSans-Regular", "Arial.", "arial."),
    *(
        "NotoSansCJK-Regular",
        "NotoSansCJK",
        "SourceHanSans",
        "NotoSansSC",
        "NotoSansJP",
        "NotoSansKR",
        "wqy-",
        "DroidSansFallback",
    ),
    *("PingFang", "Hiragino", "msyh", "YuGoth", "malgun", "Arial Unicode", "unifont"),
    *("NotoEmoji", "Symbola", "NotoSansSymbols", "seguisym", "seguiemj"),
)
NOWHERE = "\U0010ffff"  # a character that no font has: what is drawn for it stands for all that are missing


def installed_fonts(folders: Sequence[str] = FOLDERS) -> list[Path]:
    """List the installed fonts that have many characters, the best first."""
    ranked = []
    for folder in folders:
        for place, _, names in os.walk(os.path.expanduser(folder)):
            for name in names:
                rank = next((i for i, start in enumerate(FAMILIES) if name.startswith(start)), None)
                if rank is not None and name.lower().endswith((".ttf", ".ttc", ".otf")):
                    ranked.append((rank, Path(place, name)))
    return [path for _, path in sorted(ranked)]


class Fonts:
    """One font made of several: Pillow's own font, and installed ones for the characters that it lacks.

    Args:
        size: pixels.
        files: fonts that may be used, the best first; None uses the installed ones, which are searched for when one
            is needed.
    """

    def __init__(self, size: int, files: Sequence[Path] | None = None) -> None:
        from PIL import ImageFont

        self.size = size
        self._own = ImageFont.load_default(size=size)
        self._opened = [self._own]
        self._more = self._open(files)
        self._by_character: dict[str, Any] = {}

    def _open(self, files: Sequence[Path] | None) -> Iterator[Any]:
        """Open further fonts as they are needed; fonts that cannot be opened in this size are left out."""
        from PIL import ImageFont

        for path in installed_fonts() if files is None else files:
            try:
                font = ImageFont.truetype(str(path), self.size)
            except OSError:
                continue
            self._opened.append(font)
            yield font

    def font_of(self, character: str) -> Any:
        """Return the first font that has a character, or None."""
        if character not in self._by_character:
            opened = next((font for font in list(self._opened) if has(font, character)), None)
            self._by_character[character] = opened or next((font for font in self._more if has(font, character)), None)
        return self._by_character[character]

    def shown(self, text: str) -> str:
        """Replace characters that no font has: by the letter without its accent, or by the name of the symbol.

        Other missing characters stay, and are drawn as an empty box.
        """
        return " ".join("".join(map(self._substitute, unicodedata.normalize("NFC", text))).split())

    def _substitute(self, character: str) -> str:
        if character.isspace() or self.font_of(character):
            return character
        category = unicodedata.category(character)
        if category in ("Mn", "Me", "Cf"):  # accents, joiners and the like, which are nothing by themselves
            return ""
        plain = "".join(c for c in unicodedata.normalize("NFKD", character) if not unicodedata.combining(c))
        if plain and all(map(self.font_of, plain)):
            return plain
        name = unicodedata.name(character, "") if category.startswith("S") else ""
        return f" {name.lower()} " if name else character

    def legible(self, text: str) -> bool:
        """Return whether the fonts have at least half of the characters."""
        letters = [c for c in self.shown(text) if not c.isspace()]
        return 2 * sum(self.font_of(c) is not None for c in letters) >= len(letters)

    def getlength(self, text: str) -> float:
        """Return the width of a text in pixels."""
        return sum(float(font.getlength(part)) for font, part in self._runs(text))

    def write(self, pen: Any, at: tuple[float, float], text: str, fill: str) -> None:
        """Draw a line of text.

        Args:
            pen: a Pillow ``ImageDraw``.
            at: the left end of the base line.
        """
        x, y = at
        for font, part in self._runs(text):
            pen.text((x, y), part, fill=fill, font=font, anchor="ls")
            x += font.getlength(part)

    def _runs(self, text: str) -> Iterator[tuple[Any, str]]:
        """Split a text into pieces that are drawn with one font each."""
        for font, part in groupby(text, lambda c: self._own if c.isspace() else self.font_of(c) or self._own):
            yield font, "".join(part)


def has(font: Any, character: str) -> bool:
    """Return whether a font has a character."""
    drawn, missing = font.getmask(character), font.getmask(NOWHERE)
    return bool(drawn.size[0]) and (drawn.size != missing.size or bytes(drawn) != bytes(missing))
