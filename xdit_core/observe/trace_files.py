"""Write the files of a trace: the ranks compare their clocks, and rank 0 collects what each rank recorded."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from xdit_core.filesystem import atomically
from xdit_core.machine import host_name
from xdit_core.observe.spans import Record
from xdit_core.observe.status import Phase, Status
from xdit_core.observe.timeline import summary, write_chrome
from xdit_core.observe.timeline_picture import draw
from xdit_core.observe.trace import Trace, clock
from xdit_core.parallel.rank import Rank
from xdit_core.plan import Plan
from xdit_core.planning.degrees import processes

ROUNDS = 16  # exchanges by which two clocks are compared; the quickest counts


def offset(rank: int, world: int, group: Any) -> tuple[int, int]:
    """Compare the clock of this rank with that of rank 0. Every rank must call it.

    Returns:
        The moment by the clock of rank 0, and how far ahead this rank's is, in ns.
    """
    best = (clock(), 0)
    for other in range(1, world):
        if rank not in (0, other):
            continue
        quickest = 1 << 62
        for _ in range(ROUNDS):
            if rank == 0:
                sent = clock()
                dist.send(torch.tensor([sent]), other, group=group)
                answer = torch.zeros(1, dtype=torch.int64)
                dist.recv(answer, other, group=group)
                now = clock()
                dist.send(torch.tensor([now]), other, group=group)
            else:
                question, back = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
                dist.recv(question, 0, group=group)
                here = clock()
                dist.send(torch.tensor([here]), 0, group=group)
                dist.recv(back, 0, group=group)
                took, middle = int(back - question), int(question + back) // 2
                if took < quickest:
                    quickest, best = took, (middle, here - middle)
    return best


class RequestTraces:
    """Records those requests of a rank for which somebody wants a trace. Every rank makes one at the same time.

    Args:
        trace: of the engine, None if it was built without one.
    """

    def __init__(self, trace: Trace | None, rank: Rank) -> None:
        self._trace, self._rank, self._before = trace, rank, (0, 0)
        self._group = dist.new_group(backend="gloo") if trace is not None and rank.plan.world > 1 else None
        self._sent = Counter[str]()
        self.drop()

    def begin(self) -> None:
        """Record from here on. Every rank must call it."""
        if self._trace is not None:
            self._before = offset(self._rank.mesh.rank, self._rank.plan.world, self._group)
            self._sent = Counter(self._rank.sent)
            self._trace.recording = True

    def record(self) -> Record | None:
        """What was recorded since `begin`, None if nothing is."""
        if self._trace is None or not self._trace.recording:
            return None
        sent = dict(self._rank.sent - self._sent)
        return Record(self._rank.mesh.rank, host_name(), list(self._trace.spans), (self._before,), sent)

    def drop(self) -> None:
        """Record no more, and forget what was recorded."""
        if self._trace is not None:
            self._trace.recording = False
            self._trace.spans.clear()


def title_of(plan: Plan) -> str:
    """The title of the time line of a run: its model, plugins, size and steps."""
    run = plan.run
    several = f"{len(run.prompt)} prompts, " if len(run.prompt) > 1 else ""
    size = f"{run.width} x {run.height}" + (f" x {run.frames} frames" if plan.facts.video else "")
    methods = f"with {', '.join(plan.plugins)}" if plan.plugins else "without plugins"
    return (
        f"{plan.model} {methods}, {processes(plan.axes, plan.world)}; {several}{size}, {run.steps} steps, "
        f"{plan.dtype} on {plan.device}"
    )


@contextlib.contextmanager
def tracing(trace: Trace | None, rank: Rank, folder: Path) -> Iterator[None]:
    """Trace the requests inside. At the end rank 0 writes ``trace.json``, ``summary.txt`` and ``timeline.png``.

    A rank that fails writes what it saw as ``rank{n}.trace.json``. With ``profile=yes`` every rank writes
    ``rank{n}.profile.json`` of torch's profiler.
    """
    plan, world, number = rank.plan, rank.plan.world, rank.mesh.rank
    if trace is None:
        yield
        return
    group = dist.new_group(backend="gloo") if world > 1 else None
    before = offset(number, world, group)
    try:
        with profiling(folder / f"rank{number}.profile.json") if plan.run.profile else contextlib.nullcontext():
            yield
    except BaseException:
        with contextlib.suppress(OSError), atomically(folder / f"rank{number}.trace.json") as temporary:
            write_chrome([Record(number, host_name(), trace.spans)], temporary)
        raise
    rank.observer.status(Status(Phase.GATHERING, "the traces"))
    record = Record(number, host_name(), trace.spans, (before, offset(number, world, group)), dict(rank.sent))
    records: list[Any] | None = [None] * world if number == 0 else None
    if world > 1:
        dist.gather_object(record, records, dst=0, group=group)
        dist.destroy_process_group(group)
    else:
        records = [record]
    if records is not None:
        for line in write(records, folder, title_of(plan)):
            print(line, flush=True)
        if plan.run.profile:
            print(f"{folder / 'rank*.profile.json'}  torch's profiler, a file a rank", flush=True)


@contextlib.contextmanager
def profiling(path: Path) -> Iterator[None]:
    """Run the code inside under torch's profiler and write a Chrome trace."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities) as profiler:
        yield
    profiler.export_chrome_trace(str(path))


def write(records: Sequence[Record], folder: Path, title: str = "") -> list[str]:
    """Write the trace, the summary and the picture.

    Args:
        title: of the picture: what was run.

    Returns:
        Lines for the terminal: the summary and where the files are.
    """
    lines = summary(records)
    with atomically(folder / "trace.json") as temporary:
        write_chrome(records, temporary)
    with atomically(folder / "summary.txt") as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with atomically(folder / "timeline.png") as temporary:
        draw(records, title).save(temporary, format="PNG")
    files = (
        ("trace.json", "open it in ui.perfetto.dev"),
        ("timeline.png", "who waited when"),
        ("summary.txt", "the table above"),
    )
    return [*lines, *(f"{folder / name}  {what}" for name, what in files)]
