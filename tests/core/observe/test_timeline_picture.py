"""The picture of a trace says what was run and where each step ends."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

from PIL import Image, ImageDraw

from xdit_core.engine.engine import Engine
from xdit_core.observe.spans import Record, Span
from xdit_core.observe.timeline import events
from xdit_core.observe.timeline_picture import COLOURS, LEFT, RIGHT, ROW, TOP, WIDTH, draw
from xdit_core.observe.trace_files import title_of
from xdit_core.planning.planner import make_plan

MS = 1_000_000


def record(steps: int) -> Record:
    """A second of denoising on rank 0."""
    ends = [(i + 1) * 1000 // steps * MS for i in range(steps)]
    spans = [Span(f"step {i + 1}", "step", end - 1000 // steps * MS, end) for i, end in enumerate(ends)]
    return Record(0, "a", [Span("denoise", "phase", 0, 1000 * MS), *spans])


def texts_of(monkeypatch, records, title):
    """The picture, and the texts that are written into it."""
    written: list[str] = []
    inner = ImageDraw.ImageDraw.text

    def text(self, at, words, *args, **kwargs):
        written.append(words)
        return inner(self, at, words, *args, **kwargs)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    return draw(records, title), written


def test_title_and_step_marks(monkeypatch):
    """Guards against a picture of which nobody knows later what it shows."""
    picture, written = texts_of(monkeypatch, [record(4)], "emoji with usp")
    assert written[0] == "emoji with usp" and "end of a step" in written and written.count("3") == 1
    assert isinstance(picture, Image.Image)
    middle = TOP + ROW // 2
    for quarter in (1, 2, 3):
        x = LEFT + (WIDTH - LEFT - RIGHT) * quarter // 4
        dark = [max(picture.getpixel((i, middle))) < 90 for i in range(x - 2, x + 3)]
        assert any(dark) and "#{:02x}{:02x}{:02x}".format(*picture.getpixel((x + 20, middle))) == COLOURS["denoise"]


def test_numbers_do_not_lie_on_each_other(monkeypatch):
    """Of very many steps some are numbered, and a title that is too long is cut."""
    _, written = texts_of(monkeypatch, [record(500)], "word " * 200)
    numbers = [word for word in written if word.isdigit()]
    assert 20 < len(numbers) < 120 and written[0].endswith("…")


def test_a_rank_remembers_its_steps(tiny_sd3_folder):
    values = {
        "model": "sd3",
        "model.path": str(tiny_sd3_folder),
        "prompt": "a fox",
        "steps": 3,
        "device": "cpu",
        "trace": True,
    }
    plan = make_plan([], {**values, "max_sequence_length": 5})
    with Engine(plan) as engine:
        engine.generate(["a fox", "a hare"])
        spans = [s for s in engine.trace.spans if s.kind == "step"]
        denoise = [s for s in engine.trace.spans if s.name == "denoise"]
    assert [s.name for s in spans] == ["step 1", "step 2", "step 3"] * 2
    for phase, own in zip(denoise, (spans[:3], spans[3:]), strict=True):
        assert own[0].start == phase.start and own[-1].end <= phase.end
        assert all(a.end == b.start for a, b in pairwise(own))
    tracks = {
        e["args"]["name"] for e in events([Record(0, "a", spans)]) if e["ph"] == "M" and e["name"] == "thread_name"
    }
    assert "step" in tracks
    assert title_of(plan) == "sd3 without plugins, one process; 32 x 32, 3 steps, float32 on cpu"
    several = dataclasses.replace(
        plan, plugins={"usp": ("xdit", "1")}, run=dataclasses.replace(plan.run, prompt=("a", "b"))
    )
    assert title_of(several) == "sd3 with usp, one process; 2 prompts, 32 x 32, 3 steps, float32 on cpu"
