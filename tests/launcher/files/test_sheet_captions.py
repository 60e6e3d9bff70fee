"""Captions of a contact sheet can be read, whatever the language, and tell pictures of one prompt apart."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from xdit_core.outputs import results
from xdit_core.outputs.contact_sheet import contact_sheet, shortened
from xdit_core.outputs.fonts import NOWHERE, Fonts, installed_fonts
from xdit_core.outputs.names import targets
from xdit_core.settings import RunSettings


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The captions that are written, as they are when no font is installed."""
    found: list[str] = []
    monkeypatch.setattr("xdit_core.outputs.fonts.installed_fonts", list)
    monkeypatch.setattr(Fonts, "write", lambda self, pen, at, text, fill: found.append(text))
    return found


def drawn(folder: Path, names: list[list[str]]) -> list[list[Path]]:
    """Small pictures of these names."""
    for row in names:
        for name in row:
            Image.new("RGB", (8, 8)).save(folder / name)
    return [[folder / name for name in row] for row in names]


def test_seeds_where_captions_are_equal(tmp_path: Path, written: list[str]) -> None:
    """Guards against sixteen pictures of one prompt under sixteen equal captions."""
    contact_sheet(drawn(tmp_path, [["a0.png", "a1.png"]]), ["a fox"], [7, 8])
    contact_sheet(drawn(tmp_path, [["a.png"], ["b.png"]]), ["a fox", "a hare"], [7])
    assert written == ["seed 7: a fox", "seed 8: a fox", "a fox", "a hare"]


def test_the_seeds_are_those_of_the_run(tmp_path: Path, written: list[str]) -> None:
    run = RunSettings(prompt=("a fox",), images=3, seed=(40,), out=str(tmp_path / "o.png"))
    files = targets(run)
    drawn(tmp_path, [[path.name for path in files[0]]])
    assert "contact sheet" in results.write_sheet(run, files)
    assert written == [f"seed {n}: a fox" for n in (40, 41, 42)]


def test_what_no_font_has(tmp_path: Path, written: list[str]) -> None:
    """Accents are left out and symbols named; a caption of nothing but boxes is replaced by the name of the file."""
    captions = ["déjà vu, Fuchs in Schönau", "🦊 in\nthe snow \u2764\ufe0f", "狐狸在雪地里"]
    contact_sheet(drawn(tmp_path, [["a.png"], ["b.png"], ["3-0.png"]]), captions)
    assert written == ["deja vu, Fuchs in Schonau", "fox face in the snow heavy black heart", "3-0.png"]
    written.clear()
    contact_sheet(drawn(tmp_path, [["4-0.png", "4-1.png"]]), ["狐"], [1, 2])
    assert written == ["seed 1: 4-0.png", "seed 2: 4-1.png"]


class OneFont:
    """A font in which each of its characters is ten pixels wide."""

    def __init__(self, characters: str) -> None:
        self.characters, self.size = characters, 13

    def getmask(self, character: str) -> Any:
        return Image.new("L", (10, 10), ord(character) % 251 if character in self.characters else 251).im

    def getlength(self, text: str) -> float:
        return 10.0 * len(text)


def test_each_character_comes_from_the_first_font_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed fonts are opened only when a character needs them, and the rest of the text keeps its own."""
    first, second = OneFont("狐é"), OneFont("狐🦊")
    opened: list[str] = []

    def truetype(path: str, size: int) -> Any:
        opened.append(path)
        if path == "broken":
            raise OSError("invalid pixel size")  # as of a font with pictures of one size only
        return {"first": first, "second": second}[path]

    fonts = Fonts(13, [Path(name) for name in ("broken", "first", "second")])
    monkeypatch.setattr("PIL.ImageFont.truetype", truetype)
    assert fonts.shown("a fox") == "a fox" and opened == []
    assert fonts.font_of("é") is first and opened == ["broken", "first"]
    assert fonts.shown("é 狐 🦊") == "é 狐 🦊" and fonts.legible("狐🦊")
    placed: list[tuple[float, str, Any]] = []
    pen = SimpleNamespace(text=lambda at, part, fill, font, anchor: placed.append((at[0], part, font)))
    fonts.write(pen, (5, 20), "狐é🦊a", "black")
    assert [(x, part) for x, part, _ in placed] == [(5, "狐é"), (25, "🦊"), (35, "a")]
    assert [font for *_, font in placed[:2]] == [first, second] and fonts.font_of(NOWHERE) is None


def test_fonts_of_a_system(tmp_path: Path) -> None:
    """Those with many characters, the best first."""
    for name in (
        "x/NotoSansCJK-Regular.ttc",
        "y/DejaVuSans.ttf",
        "y/DejaVuSans.pfb",
        "DejaVuSans-Bold.ttf",
        "Comic.ttf",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"no font")
    found = installed_fonts([str(tmp_path), str(tmp_path / "nowhere")])
    assert [path.name for path in found] == ["DejaVuSans.ttf", "NotoSansCJK-Regular.ttc"]
    fonts = Fonts(13, found)  # and files that are damaged are passed over
    assert fonts.font_of("狐") is None
    picture = Image.new("RGB", (90, 30), "white")
    fonts.write(ImageDraw.Draw(picture), (2, 20), "a fox", "black")
    assert (np.asarray(picture) < 128).any()


def test_long_captions_are_measured_a_few_times() -> None:
    """Guards against seconds of measuring, a character less each time."""
    times: list[int] = []

    def getlength(text: str) -> int:
        times.append(len(text))
        return 10 * len(text)

    assert shortened("word " * 9999, SimpleNamespace(getlength=getlength)) == "word word word word word…"
    assert len(times) < 15 and shortened("x" * 30, SimpleNamespace(getlength=getlength), 50) == "xxxx…"
