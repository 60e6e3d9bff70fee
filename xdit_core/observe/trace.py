"""What a rank did and when: spans around the extension points in use, blocks, sends and waits.

Tracing is woven in as further wraps when the engine is built; without it none of this is called and nothing is tested
for in the hot path. Times are those of the host: on a GPU a span ends when its work is queued, and waits for other GPUs
show where the host must wait for the device.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from xdit_core.filesystem import atomically
from xdit_core.planning.degrees import processes
from xdit_core.worker.failure import HOST_VARIABLE

if TYPE_CHECKING:
    from xdit_core.engine.engine import Engine
    from xdit_core.parallel.rank import Rank
    from xdit_core.plan import Plan

ROUNDS = 16  # exchanges by which two clocks are compared; the quickest counts

clock = time.perf_counter_ns


@dataclass(frozen=True)
class Span:
    """Something that took a while.

    Args:
        name: what.
        kind: an extension point, ``block``, ``send``, ``wait``, ``phase`` or ``step``.
        start, end: nanoseconds of this rank's clock.
        axis: of the mesh, for sends and waits.
        about: ``bytes``, ``channel``, ``peer`` and ``number`` of a message; ``ranks`` of a collective, and when it
            ``began`` if that was before the wait.
    """

    name: str
    kind: str
    start: int
    end: int
    axis: str = ""
    about: dict[str, Any] = field(default_factory=dict)


class Trace:
    """The spans of one rank, in the order in which they ended."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self._groups: dict[Any, list[int]] = {}
        self._steps: list[tuple[int, int]] = []  # of this request: number, and when it was done

    @contextlib.contextmanager
    def span(self, name: str, kind: str, axis: str = "", **about: Any) -> Iterator[None]:
        """Around what is to be seen."""
        start = clock()
        try:
            yield
        finally:
            self.spans.append(Span(name, kind, start, clock(), axis, about))

    def call(self, name: str, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, seen; not where a compiler follows it."""

        def seen(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return function(*args, **kwargs)
            with self.span(name, kind):
                return function(*args, **kwargs)

        return seen

    def wrap(self, name: str, kind: str) -> Callable[..., Any]:
        """A wrap of an extension point that only looks."""

        def seen(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            with self.span(name, kind):
                return inner(*args, **kwargs)

        return seen

    def woven(self, point: str, names: Sequence[str], wraps: Sequence[Callable[..., Any]]) -> list[Callable[..., Any]]:
        """The wraps, each seen, and what they are wrapped around."""
        both = [
            part
            for name, wrap in zip(names, wraps, strict=True)
            for part in (self.wrap(f"{point}: {name}", point), wrap)
        ]
        return [*both, self.wrap(f"{point}: the model's own", point)]

    def chains(self, plan: Plan, chains: Mapping[str, list[Any]], woven: bool) -> dict[str, list[Any]]:
        """The wraps of all points by name, with those that look; a point that nobody uses is left as it is.

        Args:
            woven: the blocks are a trunk.
        """
        found = dict(chains)
        for point in (
            "request",
            "forward",
            "decode",
            *(["trunk"] if woven else []),
            *(["attention"] if {"attention", "kernel"} & set(chains) else []),
        ):
            pairs = [(level, name) for level, name in plan.wraps.get(point, ()) if level != "kernel"]
            found[point] = self.woven(point, [f"{name} ({level})" for level, name in pairs], chains.get(point, []))
        if "attention" in found:  # what computes lies behind the choice of the mask
            own = found["attention"].pop()
            kernels = [name for level, name in plan.wraps.get("attention", ()) if level == "kernel"]
            found["kernel"] = [
                *self.woven("attention", [f"{name} (kernel)" for name in kernels], chains.get("kernel", []))[:-1],
                own,
            ]
        return found

    def look_at(self, rank: Rank) -> None:
        """Replace what tells nobody of waits by what remembers them."""
        plain = rank.waiting

        @contextlib.contextmanager
        def waiting(
            what: str, axis: str = "", group: Any = None, message: tuple[str, int, int] | None = None, began: int = 0
        ) -> Iterator[None]:
            about: dict[str, Any] = {}
            if message is not None:
                about = dict(zip(("channel", "peer", "number"), message, strict=True))
            elif group is not None:
                about = {"ranks": self._ranks(group), **({"began": began} if began else {})}
            with plain(what), self.span(what, "wait", axis or what, **about):
                yield

        rank.waiting = waiting  # type: ignore[method-assign]
        rank.began = clock  # type: ignore[method-assign]

    def _ranks(self, group: Any) -> list[int]:
        if group not in self._groups:
            self._groups[group] = dist.get_process_group_ranks(group)
        return self._groups[group]

    def step(self, number: int) -> None:
        """A step of the pipeline is done, counted from 1."""
        self._steps.append((number, clock()))

    def phases(self, marks: dict[str, float]) -> None:
        """Encoding, denoising and decoding of a request, from its marks in seconds of the same clock, and its steps."""
        end = clock() / 1e9
        encoded = marks.get("encoded", end)
        denoised = marks.get("denoised", end)
        times = (("encode", marks["start"], encoded), ("denoise", encoded, denoised), ("decode", denoised, end))
        self.spans += [Span(name, "phase", int(a * 1e9), int(b * 1e9)) for name, a, b in times if b > a]
        starts = [int(encoded * 1e9), *(moment for _, moment in self._steps)]
        self.spans += [
            Span(f"step {n}", "step", start, moment) for (n, moment), start in zip(self._steps, starts, strict=False)
        ]
        self._steps.clear()


@dataclass(frozen=True)
class Record:
    """What one rank saw.

    Args:
        sent: bytes that it sent, by name, as strategies count them.
        offsets: at two moments of the common clock (rank 0's, ns), how far this rank's clock is ahead of it in ns.
    """

    rank: int
    host: str
    spans: Sequence[Span]
    offsets: tuple[tuple[int, int], ...] = ()
    sent: Mapping[str, int] = field(default_factory=dict)


def name_of_host() -> str:
    """As the user calls it."""
    return os.environ.get(HOST_VARIABLE) or socket.gethostname()


def offset(rank: int, world: int, group: Any) -> tuple[int, int]:
    """Compare this rank's clock with rank 0's by exchanges between the two; every rank must call it.

    Returns:
        The moment by the clock of rank 0, and how far ahead this rank's is, in ns.
    """
    found = (clock(), 0)
    for other in range(1, world):
        if rank not in (0, other):
            continue
        quickest = 1 << 62
        for _ in range(ROUNDS):
            if rank == 0:
                sent = clock()
                dist.send(torch.tensor([sent]), other, group=group)
                theirs = torch.zeros(1, dtype=torch.int64)
                dist.recv(theirs, other, group=group)
                now = clock()
                dist.send(torch.tensor([now]), other, group=group)
            else:
                told, back = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
                dist.recv(told, 0, group=group)
                mine = clock()
                dist.send(torch.tensor([mine]), 0, group=group)
                dist.recv(back, 0, group=group)
                took, middle = int(back - told), int(told + back) // 2
                if took < quickest:
                    quickest, found = took, (middle, mine - middle)
    return found


def title_of(plan: Plan) -> str:
    """What a picture of a run is a picture of."""
    run = plan.run
    several = f"{len(run.prompt)} prompts, " if len(run.prompt) > 1 else ""
    size = f"{run.width} x {run.height}" + (f" x {run.frames} frames" if plan.facts.video else "")
    methods = f"with {', '.join(plan.plugins)}" if plan.plugins else "without plugins"
    return (
        f"{plan.model} {methods}, {processes(plan.axes, plan.world)}; {several}{size}, {run.steps} steps, "
        f"{plan.dtype} on {plan.device}"
    )


@contextlib.contextmanager
def tracing(engine: Engine, folder: Path) -> Iterator[None]:
    """Around the requests of a run: at the end rank 0 writes ``trace.json``, ``summary.txt`` and ``timeline.png``.

    A rank that fails writes what it saw as ``rank{n}.trace.json``. With ``profile=yes`` every rank writes
    ``rank{n}.profile.json`` of torch's profiler.
    """
    from xdit_core.observe.timeline import write, write_chrome

    trace, world = engine.rank.trace, engine.plan.world
    if trace is None:
        yield
        return
    rank = dist.get_rank() if world > 1 else 0
    group = dist.new_group(backend="gloo") if world > 1 else None
    before = offset(rank, world, group)
    try:
        with profiling(folder / f"rank{rank}.profile.json") if engine.plan.run.profile else contextlib.nullcontext():
            yield
    except BaseException:
        with contextlib.suppress(OSError), atomically(folder / f"rank{rank}.trace.json") as temporary:
            write_chrome([Record(rank, name_of_host(), trace.spans)], temporary)
        raise
    engine.rank.doing("bringing the traces together")
    mine = Record(rank, name_of_host(), trace.spans, (before, offset(rank, world, group)), dict(engine.rank.sent))
    records: list[Any] | None = [None] * world if rank == 0 else None
    if world > 1:
        dist.gather_object(mine, records, dst=0, group=group)
        dist.destroy_process_group(group)
    else:
        records = [mine]
    if records is not None:
        for line in write(records, folder, title_of(engine.plan)):
            print(line, flush=True)
        if engine.plan.run.profile:
            print(f"{folder / 'rank*.profile.json'}  torch's profiler, a file a rank", flush=True)


@contextlib.contextmanager
def profiling(path: Path) -> Iterator[None]:
    """Torch's profiler, written as a Chrome trace."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities) as profiler:
        yield
    profiler.export_chrome_trace(str(path))
