"""Traces: what is seen is what happened, and nobody is looked at who does not want to be."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from xdit_core import Engine, Observer
from xdit_core.observe.spans import Record, Span
from xdit_core.observe.timeline import common, covered, events, rows_of, summary, waits_of
from xdit_core.observe.trace import Trace
from xdit_core.observe.trace_files import offset, tracing, write
from xdit_core.observe.weaving import watched
from xdit_core.testing.runs import diffusers_latents, plan_for


def traced(plugins, folder, settings, out=None):
    engine = Engine(plan_for(plugins, folder, {"trace": True, **settings}))
    if out is None:
        output = engine.generate("a red fox")
    else:
        with tracing(engine.trace, engine.rank, Path(out)):
            output = engine.generate("a red fox")
    engine.close()
    return output.latents, engine.trace.spans, dict(engine.rank.sent)


@pytest.mark.parametrize(
    ("plugins", "settings", "world"),
    [
        (["usp"], {"usp.ulysses": 2, "usp.ring": 1}, 2),
        (["usp"], {"usp.ulysses": 1, "usp.ring": 2}, 2),
        (["pipefusion"], {"pipefusion.stages": 2, "pipefusion.patches": 2, "pipefusion.warmup": 4}, 2),
        (["cfg"], {}, 2),
        (["distrifusion"], {"distrifusion.degree": 2, "distrifusion.warmup": 4}, 2),
        (["tp"], {"tp.degree": 2}, 2),
    ],
)
def test_a_traced_run_gives_the_same(gloo, tiny_sd3_folder, plugins, settings, world):
    results = gloo.run(traced, plugins, str(tiny_sd3_folder), settings, world=world)
    serial = diffusers_latents(str(tiny_sd3_folder))
    for latents, spans, _ in results:
        torch.testing.assert_close(latents, serial, atol=1e-5, rtol=1e-5)
        assert any(s.kind == "wait" for s in spans)


def test_what_is_seen(gloo, tiny_sd3_folder):
    """4 steps, of which 2 in 2 patches, 4 blocks on 2 stages, 2 ranks each."""
    settings = {
        "usp.ulysses": 2,
        "usp.ring": 1,
        "pipefusion.stages": 2,
        "pipefusion.patches": 2,
        "pipefusion.warmup": 2,
        "steps": 4,
    }
    results = gloo.run(traced, ["usp", "pipefusion"], str(tiny_sd3_folder), settings, world=4)
    spans = {rank: s for rank, (_, s, _) in enumerate(results)}
    for rank, mine in spans.items():
        kinds = Counter(s.kind for s in mine)
        assert {"request", "forward", "trunk", "attention", "block", "wait", "phase"} <= kinds.keys()
        blocks = Counter(s.name for s in mine if s.kind == "block")
        first = 2 * (rank // 2)
        assert blocks == {
            f"block {i}": 2 + 2 * 2 for i in (first, first + 1)
        }  # once a call: two whole, two of two patches each
        stack: list[Span] = []
        for s in sorted(mine, key=lambda s: (s.start, -s.end)):  # what begins inside something ends inside it
            if s.kind == "phase":
                continue
            while stack and stack[-1].end <= s.start:
                stack.pop()
            assert not stack or s.end <= stack[-1].end
            stack.append(s)
        names = {s.name for s in mine}
        assert {"attention: usp (exchange)", "attention: pipefusion (cache)", "attention: the model's own"} <= names
        sent = sum(s.about["bytes"] for s in mine if s.kind == "send")
        counts = results[rank][2]
        assert sent == sum(n for name, n in counts.items() if name.split(".")[0] in ("stages", "latents")) > 0
    sends = {
        (s.about["channel"], r, s.about["peer"], s.about["number"])
        for r, m in spans.items()
        for s in m
        if s.kind == "send"
    }
    asked = {
        (s.about["channel"], s.about["peer"], r, s.about["number"])
        for r, m in spans.items()
        for s in m
        if s.kind == "wait" and "channel" in s.about
    }
    assert asked and asked == sends  # every message is waited for, once, by the rank it went to


def test_nobody_is_looked_at_without_being_asked(tiny_sd3_folder):
    """Without an observer the chains hold the wraps of the plugins and nothing else, and the blocks are called as they
    are; with a trace each wrap, the model's own code inside them and each block is called through one function more."""
    plan = plan_for(["pipefusion"], str(tiny_sd3_folder), {"nproc": 1, "pipefusion.patches": 2})
    plain = Engine(plan)
    seen = Engine(dataclasses.replace(plan, run=dataclasses.replace(plan.run, trace=True)))
    assert type(plain.rank.observer) is Observer and plain.trace is None and seen.rank.observer is seen.trace
    assert plain.rank.waiting("x") is plain.rank.waiting("y")  # nothing is made for a wait

    def wraps(run):
        """The functions between a call of a point and the model's own code."""
        names = []
        while (cells := getattr(run, "__closure__", None)) and "inner" in run.__code__.co_freevars:
            inside = dict(zip(run.__code__.co_freevars, (cell.cell_contents for cell in cells), strict=True))
            names.append(getattr(inside["wrap"], "__qualname__", type(inside["wrap"]).__name__))
            run = inside.get("passed", inside["inner"])
            while run.__name__ == "checked_inner":
                run = dict(zip(run.__code__.co_freevars, (c.cell_contents for c in run.__closure__), strict=True))[
                    "inner"
                ]
        return names

    looking = "watching.<locals>.seen"
    for chain in ("trunk", "forward", "request", "attention"):
        runs = [
            {
                "trunk": engine.trunks[0]._run,
                "forward": engine.forwards[0]._run,
                "request": engine._run,
                "attention": engine.trunks[0]._point.run,
            }[chain]
            for engine in (plain, seen)
        ]
        own, with_trace = wraps(runs[0]), wraps(runs[1])
        assert looking not in own and [name for name in with_trace if name != looking] == own
        plugins = len([name for name in own if name != "AttentionPoint.select_mask"])
        assert with_trace.count(looking) == plugins + 1
    assert all(isinstance(block, torch.nn.Module) for _, block, _ in plain.trunks[0]._order)
    assert [block.__qualname__ for _, block, _ in seen.trunks[0]._order] == ["watched.<locals>.seen"] * 4


def test_a_message(monkeypatch):
    """Rank 1 waits from 0 to 100 ns for what rank 0 sends at 60; and once for what had come long before."""
    spans = {
        0: [
            Span("send stages", "send", 60, 62, "stages", {"channel": "stages", "peer": 1, "number": 1, "bytes": 8}),
            Span("send stages", "send", 110, 111, "stages", {"channel": "stages", "peer": 1, "number": 2, "bytes": 8}),
        ],
        1: [
            Span("stages", "wait", 0, 100, "stages", {"channel": "stages", "peer": 0, "number": 1}),
            Span("stages", "wait", 200, 210, "stages", {"channel": "stages", "peer": 0, "number": 2}),
        ],
    }
    first, second = waits_of(spans)
    assert (first.bubble, first.exposed) == (60, 40)
    assert (second.bubble, second.exposed) == (0, 10)
    row = rows_of(spans, [first, second])[1, "stages"]
    assert (row.communication, row.exposed, row.bubble) == (40 + 100, 50, 60)
    assert rows_of(spans, [first, second])[0, ""].sent == 16


def test_a_collective():
    """Three ranks enter at 0, 30 and 50 and leave at 80; a second one of the same name is another."""
    about = {"ranks": [0, 1, 2]}
    spans = {
        rank: [
            Span("the exchange", "wait", start, 80, "ulysses", about),
            Span("the exchange", "wait", 100, 110 + rank, "ulysses", about),
        ]
        for rank, start in enumerate((0, 30, 50))
    }
    found = waits_of(spans)
    assert [(w.bubble, w.exposed) for w in found if w.end == 80] == [(50, 30), (20, 30), (0, 30)]
    assert all(w.bubble == 0 for w in found if w.end > 80)


def test_a_collective_that_is_begun_ahead():
    """Both begin it early; rank 1 as the last, at 40. What is waited for behind that is exposed, and all since then is
    communication."""
    spans = {
        rank: [Span("the ring", "wait", start, 100, "ring", {"ranks": [0, 1], "began": began})]
        for rank, (began, start) in enumerate(((10, 20), (40, 90)))
    }
    found = waits_of(spans)
    assert [(w.bubble, w.exposed) for w in found] == [(20, 60), (0, 10)]
    rows = rows_of(spans, found)
    assert (rows[0, "ring"].communication, rows[1, "ring"].communication) == (60, 60)
    ahead = Record(1, "b", spans[1], ((0, 7), (200, 7)))
    assert common(ahead)[0].about["began"] == 33


def test_clocks():
    """Rank 1's clock is 1,000 ns ahead at first and 1,100 at the end."""
    span = Span("x", "block", 1_500 + 1_050, 1_600 + 1_050)
    record = Record(1, "b", [span], ((1_000, 1_000), (2_000, 1_100)))
    (moved,) = common(record)
    assert abs(moved.start - 1_500) <= 20 and abs(moved.end - 1_600) <= 20
    assert common(Record(0, "a", [span], ((0, 0), (9, 0)))) == [span]


def skewed(ahead):
    """Every rank's clock is off by its own amount."""
    from xdit_core.observe import trace_files

    real, rank, world = trace_files.clock, dist.get_rank(), dist.get_world_size()
    trace_files.clock = lambda: real() + ahead * rank
    try:
        return [offset(rank, world, None)[1] for _ in range(3)]
    finally:
        trace_files.clock = real


def test_clocks_are_compared(gloo):
    ahead = 5_000_000_000
    for rank, found in enumerate(gloo.run(skewed, ahead, world=3)):
        assert min(abs(o - rank * ahead) for o in found) < 50_000_000  # ns; a hundredth of what is to be found


def test_covered():
    assert covered([]) == 0
    assert covered([(0, 10), (5, 20), (30, 31), (6, 7)]) == 21


def test_files(gloo, tiny_sd3_folder, tmp_path, capfd):
    settings = {"pipefusion.stages": 2, "pipefusion.patches": 2}
    gloo.run(traced, ["pipefusion"], str(tiny_sd3_folder), settings, str(tmp_path), world=2)
    found = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    whole = [e for e in found if e["ph"] == "X"]
    assert {e["pid"] for e in whole} == {0, 1} and all(e["ts"] >= 0 and e["dur"] >= 0 for e in whole)
    arrows = Counter(e["ph"] for e in found if e.get("cat") == "message")
    assert arrows["s"] and arrows["s"] == arrows["f"]
    text = (tmp_path / "summary.txt").read_text().splitlines()
    assert text[0].split() == [
        "rank",
        "host",
        "seconds",
        "encode",
        "denoise",
        "decode",
        "compute",
        "communication",
        "exposed",
        "bubble",
    ]
    assert len([line for line in text if line.startswith("stages")]) == 2
    from PIL import Image

    picture = Image.open(tmp_path / "timeline.png").convert("RGB")
    assert picture.width == 1600 and len(set(picture.getdata())) > 4


def broken(folder, out):
    engine = Engine(plan_for([], folder, {"trace": True}))
    with pytest.raises(ValueError, match="on purpose"), tracing(engine.trace, engine.rank, Path(out)):
        engine.generate("a red fox")
        raise ValueError("on purpose")


def test_what_was_seen_before_a_failure_stays(tiny_sd3_folder, tmp_path):
    broken(str(tiny_sd3_folder), tmp_path)
    assert json.loads((tmp_path / "rank0.trace.json").read_text())["traceEvents"]
    assert not (tmp_path / "trace.json").exists()


def test_nothing_to_show(tmp_path):
    record = Record(0, "a", [])
    assert len(summary([record])) == 2 and len(list(events([record]))) > 2
    assert len(write([record], tmp_path)) == 5


def test_a_compiler_is_not_disturbed():
    trace = Trace()
    seen = watched(lambda x: x + 1, trace.block(0))
    compiled = torch.compile(seen, backend="eager", fullgraph=True)
    assert compiled(torch.ones(2)).tolist() == [2.0, 2.0]
