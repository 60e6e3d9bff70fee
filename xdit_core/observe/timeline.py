"""Make one trace and a summary from the records of all ranks. Without torch."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from xdit_core.observe.spans import Record, Span

TRACKS = ("phase", "step", "request", "forward", "trunk", "block", "attention", "decode", "send", "wait")


@dataclass(frozen=True)
class Wait:
    """A wait, divided: before ``begun`` the peer had nothing to give (bubble), behind it data was on its way (exposed
    communication).

    Args:
        start, begun, end: ns of the common clock; ``begun`` lies between the others.
        sent: when what was waited for was sent, for messages and for collectives that were begun ahead; it may be long
            before the wait.
    """

    rank: int
    axis: str
    start: int
    begun: int
    end: int
    sent: int | None = None

    @property
    def bubble(self) -> int:
        """ns."""
        return self.begun - self.start

    @property
    def exposed(self) -> int:
        """ns."""
        return self.end - self.begun


def common(record: Record) -> list[Span]:
    """The spans of a rank in the time of rank 0. The offset of the clocks is interpolated between two measurements."""
    offsets = record.offsets
    if not offsets or not any(ahead for _, ahead in offsets):
        return list(record.spans)
    (first, a), (last, b) = offsets[0], offsets[-1]

    def moved(t: int) -> int:
        share = (t - a - first) / (last - first) if last > first else 0.0
        return t - round(a + (b - a) * share)

    def about(s: Span) -> dict[str, Any]:
        return {**s.about, "began": moved(s.about["began"])} if "began" in s.about else s.about

    return [replace(s, start=moved(s.start), end=moved(s.end), about=about(s)) for s in record.spans]


def waits_of(spans: Mapping[int, Sequence[Span]]) -> list[Wait]:
    """Find for every wait the moment at which its peers had done their part.

    A message is matched with its send by channel, ranks and number; a collective with the same wait of the other ranks,
    by how often it has happened.
    """
    sent: dict[Any, int] = {}
    entered: dict[Any, list[int]] = defaultdict(list)
    times: Counter[Any] = Counter()
    keys: dict[tuple[int, int], Any] = {}
    for rank, all_ in spans.items():
        for i, s in enumerate(all_):
            if s.kind == "send":
                sent[s.about["channel"], rank, s.about["peer"], s.about["number"]] = s.start
            elif s.kind == "wait" and "ranks" in s.about:
                name = (s.name, s.axis, tuple(s.about["ranks"]))
                keys[rank, i] = (*name, times[rank, name])
                times[rank, name] += 1
                entered[keys[rank, i]].append(s.about.get("began", s.start))
    waits = []
    for rank, all_ in spans.items():
        for i, s in enumerate(all_):
            if s.kind != "wait":
                continue
            moment: int | None = None
            last = s.start
            if "channel" in s.about:
                moment = sent.get((s.about["channel"], s.about["peer"], rank, s.about["number"]))
            elif (rank, i) in keys:
                last = max(entered[keys[rank, i]])
                moment = last if "began" in s.about else None
            begun = last if moment is None else moment
            waits.append(Wait(rank, s.axis, s.start, min(max(begun, s.start), s.end), s.end, moment))
    return waits


def covered(intervals: Iterable[tuple[int, int]]) -> int:
    """How many ns are covered by at least one of the intervals."""
    total, reached = 0, -(1 << 62)
    for start, end in sorted(intervals):
        if end > reached:
            total += end - max(start, reached)
            reached = end
    return total


@dataclass(frozen=True)
class Row:
    """Times in ns of one rank, in all or along one axis.

    Args:
        communication: while something for this rank was on its way: from its sending, or for a collective from the last
            rank's coming, until it was there, or asked for.
        exposed: of that, while this rank stood still.
        bubble: while it stood still for a peer that was not so far.
        sent: bytes of messages.
    """

    communication: int
    exposed: int
    bubble: int
    sent: int


def rows_of(spans: Mapping[int, Sequence[Span]], waits: Sequence[Wait]) -> dict[tuple[int, str], Row]:
    """The times of each rank along each axis, and under "" along all axes together."""
    sent: Counter[tuple[int, str]] = Counter()
    for rank, all_ in spans.items():
        for s in all_:
            if s.kind == "send":
                sent[rank, s.axis] += s.about["bytes"]
                sent[rank, ""] += s.about["bytes"]
    axes = sorted({w.axis for w in waits} | {axis for _, axis in sent if axis})
    rows = {}
    for rank in spans:
        for axis in ["", *axes]:
            own = [w for w in waits if w.rank == rank and axis in ("", w.axis)]
            on_the_way = [(w.begun if w.sent is None else min(w.sent, w.begun), w.end) for w in own]
            rows[rank, axis] = Row(
                covered(on_the_way), sum(w.exposed for w in own), sum(w.bubble for w in own), sent[rank, axis]
            )
    return rows


def summary(records: Sequence[Record]) -> list[str]:
    """The summary as lines of text."""
    spans = {r.rank: common(r) for r in records}
    waits = waits_of(spans)
    rows, hosts = rows_of(spans, waits), {r.rank: r.host for r in records}
    phases = {rank: Counter[str]() for rank in spans}
    for rank, all_ in spans.items():
        for s in all_:
            if s.kind == "phase":
                phases[rank][s.name] += s.end - s.start
    lines = [
        table_line(
            "rank", "host", "seconds", "encode", "denoise", "decode", "compute", "communication", "exposed", "bubble"
        )
    ]
    for rank in sorted(spans):
        total, row = sum(phases[rank].values()), rows[rank, ""]
        shares = (total - row.exposed - row.bubble, row.communication, row.exposed, row.bubble)
        times = (f"{phases[rank][name] / 1e9:.2f}" for name in ("encode", "denoise", "decode"))
        lines.append(table_line(rank, hosts[rank], f"{total / 1e9:.2f}", *times, *(percent(x, total) for x in shares)))
    axes = sorted({axis for _, axis in rows if axis})
    if axes:
        lines += ["", table_line("axis", "rank", "seconds", "", "", "sent", "", "communication", "exposed", "bubble")]
    for axis in axes:
        for r in sorted(records, key=lambda r: r.rank):
            row, total = rows[r.rank, axis], sum(phases[r.rank].values())
            bytes_ = max(row.sent, r.sent.get(axis, 0))
            sent = f"{bytes_ / 2**20:.1f} MiB" if bytes_ else ""
            cells = (percent(x, total) for x in (row.communication, row.exposed, row.bubble))
            lines.append(table_line(axis, r.rank, f"{row.communication / 1e9:.2f}", "", "", sent, "", *cells))
    return lines


def table_line(*cells: object) -> str:
    """A line of the summary with its cells in columns."""
    wide = (14, 14, 9, 8, 9, 10, 9, 15, 9, 8)
    return "".join(f"{cell!s:<{w}}" for cell, w in zip(cells, wide, strict=True)).rstrip()


def percent(part: int, whole: int) -> str:
    """A part of the time of a rank in percent."""
    return f"{100 * part / whole:.1f} %" if whole else "-"


def events(records: Sequence[Record]) -> Iterator[dict[str, Any]]:
    """Chrome's trace events, microseconds from the first span; a process a rank, a thread a kind, arrows from sends to
    waits."""
    spans = {r.rank: common(r) for r in records}
    zero = min((s.start for all_ in spans.values() for s in all_), default=0)
    for r in records:
        yield {"ph": "M", "pid": r.rank, "name": "process_name", "args": {"name": f"rank {r.rank} on {r.host}"}}
        yield {"ph": "M", "pid": r.rank, "name": "process_sort_index", "args": {"sort_index": r.rank}}
        for number, kind in enumerate(TRACKS):
            yield {"ph": "M", "pid": r.rank, "tid": number, "name": "thread_name", "args": {"name": kind}}
    for rank, all_ in spans.items():
        for s in all_:
            at, took = (s.start - zero) / 1e3, (s.end - s.start) / 1e3
            base = {"pid": rank, "tid": TRACKS.index(s.kind), "ts": at}
            yield {
                **base,
                "ph": "X",
                "dur": took,
                "name": s.name,
                "cat": s.kind,
                "args": {"axis": s.axis, **s.about} if s.axis else s.about,
            }
            if "channel" in s.about:
                ends = (rank, s.about["peer"]) if s.kind == "send" else (s.about["peer"], rank)
                name = f"{s.about['channel']} {ends[0]} to {ends[1]}: {s.about['number']}"
                arrow = {"ph": "s"} if s.kind == "send" else {"ph": "f", "bp": "e", "ts": at + took}
                yield {**base, **arrow, "id": name, "name": "message", "cat": "message"}


def write_chrome(records: Sequence[Record], path: Path) -> None:
    """Write a file for ui.perfetto.dev or chrome://tracing."""
    path.write_text(chrome(records), encoding="utf-8")


def chrome(records: Sequence[Record]) -> str:
    """The contents of such a file."""
    return json.dumps({"traceEvents": list(events(records)), "displayTimeUnit": "ms"})
