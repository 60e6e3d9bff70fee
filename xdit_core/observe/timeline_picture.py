"""Draw a run: a row for each rank, with colours for what it did. Without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from xdit_core.observe.spans import Record, Span
from xdit_core.observe.timeline import common, waits_of
from xdit_core.outputs.contact_sheet import shortened

WIDTH, LEFT, RIGHT, TOP, ROW, GAP = 1600, 170, 30, 96, 34, 22  # pixels
KEYS = 52  # pixels from the top to the middle of the legend
COLOURS: Mapping[str, str] = MappingProxyType(
    {
        "encode": "#b9c7d6",
        "denoise": "#4f81bd",
        "decode": "#7fb27f",
        "exposed communication": "#e8893a",
        "bubble": "#f3dcb8",
    }
)
INK, PAPER, LINE = "#202020", "#ffffff", "#d8d8d8"


def draw(records: Sequence[Record], title: str = "") -> Image.Image:
    """Draw the time line of all ranks in the time of rank 0.

    Args:
        title: what was run; it is cut where it does not fit.
    """
    spans = {r.rank: common(r) for r in sorted(records, key=lambda r: r.rank)}
    everything = [s for all_ in spans.values() for s in all_]
    zero, end = min((s.start for s in everything), default=0), max((s.end for s in everything), default=1)
    height = TOP + len(spans) * (ROW + GAP) + 50
    picture = Image.new("RGB", (WIDTH, height), PAPER)
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(size=15)
    heading = ImageFont.load_default(size=18)
    pen.text((LEFT, 20), shortened(title, heading, WIDTH - LEFT - RIGHT), INK, heading, anchor="lm")
    legend(pen, font)

    def x(t: int) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (t - zero) / max(end - zero, 1)

    ticks(pen, font, zero, end, x, height)
    hosts, waits = {r.rank: r.host for r in records}, waits_of(spans)
    for i, (rank, all_) in enumerate(spans.items()):
        top = TOP + i * (ROW + GAP)
        pen.text((LEFT - 12, top + ROW // 2), f"{rank}  {hosts[rank]}"[:18], INK, font, anchor="rm")
        for s in all_:
            if s.kind == "phase":
                pen.rectangle((x(s.start), top, x(s.end), top + ROW), COLOURS[s.name])
        for w in waits:
            if w.rank == rank:
                bar(pen, x(w.start), x(w.begun), top, COLOURS["bubble"])
                bar(pen, x(w.begun), x(w.end), top, COLOURS["exposed communication"])
        steps(pen, [s for s in all_ if s.kind == "step"], x, top)
    return picture


def bar(pen: Any, start: float, end: float, top: int, colour: str) -> None:
    """Draw a wait. One of less than half a pixel is left out, since it would hide the work around it."""
    if end - start >= 0.5:
        pen.rectangle((start, top, end, top + ROW), colour)


def steps(pen: Any, spans: Sequence[Span], x: Any, top: int) -> None:
    """Draw a line where each step of a rank ends, with its number below if there is room."""
    font, free = ImageFont.load_default(size=11), float("-inf")
    for s in spans:
        at, number = x(s.end), s.name.rpartition(" ")[2]
        pen.line((at, top - 3, at, top + ROW + 4), INK)
        width = pen.textlength(number, font)
        if at - width / 2 > free:
            pen.text((at, top + ROW + 11), number, INK, font, anchor="mm")
            free = at + width / 2 + 4


def legend(pen: Any, font: Any) -> None:
    """Draw what the colours mean."""
    at = float(LEFT)
    for name, colour in COLOURS.items():
        pen.rectangle((at, KEYS - 9, at + 18, KEYS + 9), colour, LINE)
        pen.text((at + 26, KEYS), name, INK, font, anchor="lm")
        at += 26 + pen.textlength(name, font) + 34
    pen.line((at + 9, KEYS - 11, at + 9, KEYS + 11), INK)
    pen.text((at + 20, KEYS), "end of a step", INK, font, anchor="lm")


def ticks(pen: Any, font: Any, zero: int, end: int, x: Any, height: int) -> None:
    """Draw at most a dozen marks of seconds along the bottom."""
    seconds = max((end - zero) / 1e9, 1e-9)
    step = next(s for k in range(-6, 7) for s in (10.0**k, 2 * 10.0**k, 5 * 10.0**k) if seconds / s <= 12)
    for i in range(int(seconds / step) + 1):
        at = x(zero + int(i * step * 1e9))
        pen.line((at, TOP - 8, at, height - 40), LINE)
        pen.text((at, height - 22), f"{i * step:g} s", INK, font, anchor="mm")
