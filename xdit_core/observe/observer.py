"""Everything that can be observed on a rank, and the base class of observers.

Everything that happens on a rank is told to one observer: ``rank.observer``. The progress line, the heartbeat, the
trace, what ``verify`` records and whatever a plugin returns from ``xdit_observe`` are observers, and several of them
are combined into one. An observer only watches: it cannot replace a result.

Without torch, so that the module of a plugin can define its observer at the top.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from xdit_core.observe.status import Status

if TYPE_CHECKING:
    import torch

    from xdit_core.points.context import ForwardContext
    from xdit_core.points.request import Job, Output

Around = Callable[[], AbstractContextManager[None]]
UNSEEN: AbstractContextManager[None] = nullcontext()


@dataclass(frozen=True, slots=True)
class Awaited:
    """What a rank waits for.

    Args:
        what: in words, such as ``the ring``.
        axis: of the mesh, ``what`` if it is none.
        group: the process group, if a collective is waited for.
        message: channel, source rank and number, if a message is.
        began: when what is waited for was begun, in ns of ``time.perf_counter_ns``; 0 if it begins with the wait.
    """

    what: str
    axis: str = ""
    group: Any = None
    message: tuple[str, int, int] | None = None
    began: int = 0


@dataclass(frozen=True, slots=True)
class Sending:
    """A message that a rank sends.

    Args:
        channel: name of the channel.
        axis: of the mesh.
        peer: the rank that it goes to.
        number: distinguishes it from other messages of the channel. The `Awaited` of the peer has the same number.
        size: bytes.
        what: kind of the message, if the channel has several kinds; else "".
    """

    channel: str
    axis: str
    peer: int
    number: int
    size: int
    what: str = ""


class Observer:
    """Watches one rank; every method does nothing until a subclass says what it does.

    Whether ``point``, ``block`` and ``rows`` are called is decided when the engine is built. What no observer watches
    costs nothing in a run.

    Attributes:
        sees_every_wait: strategies then wait for a result where it arrives rather than where it is used, so that each
            wait is told; this costs time.
    """

    sees_every_wait: bool = False

    def status(self, status: Status) -> None:
        """The rank now does something else."""

    def waiting(self, awaited: Awaited) -> AbstractContextManager[None]:
        """Return a context that is entered around a wait for other ranks."""
        return UNSEEN

    def sending(self, message: Sending) -> AbstractContextManager[None]:
        """Return a context that is entered around the sending of a message."""
        return UNSEEN

    def point(self, point: str, level: str, plugin: str) -> Around | None:
        """Return a function that makes a context for each call of a wrap, or None to leave the wrap alone.

        It is asked for once for each wrap, when the engine is built.

        Args:
            point: the extension point, such as ``attention``.
            level: of the wrap, "" for the model's own code inside all wraps.
            plugin: whose wrap it is, "" for the model's own code.
        """
        return None

    def block(self, index: int) -> Around | None:
        """Return the same for a block. It is asked for once for each block that this rank holds."""
        return None

    def rows(self, place: int, rows: torch.Tensor, context: ForwardContext) -> None:
        """Rows ``[B, n, D]`` of the picture were passed from one block to the next.

        Args:
            place: 0 before the first block, ``i + 1`` behind block ``i``.
            context: of the call of the denoiser; says which rows of the picture these are.
        """

    def step_latents(self, step: int, latents: torch.Tensor) -> None:
        """The latents behind a step are complete; they are shown one step later, so that no rank waits for them.

        Only ranks that own pictures are told.

        Args:
            step: counted from 1.
            latents: as the scheduler returned them; not to be written to.
        """

    def latents(self, latents: torch.Tensor) -> None:
        """The VAE is about to decode these latents."""

    def engine_built(self, seconds: float) -> None:
        """The engine is ready, after building and loading for so many seconds."""

    def engine_closed(self) -> None:
        """The engine was closed."""

    def job_started(self, job: Job) -> None:
        """A call of the pipeline begins."""

    def step_done(self, step: int, steps: int) -> None:
        """A step of the pipeline is done. Steps are counted from 1."""

    def job_done(self, job: Job, phases: Mapping[str, tuple[float, float]]) -> None:
        """A call of the pipeline is done.

        Args:
            phases: begin and end of ``encode``, ``denoise`` and ``decode``, in seconds of ``time.perf_counter``.
        """

    def output_done(self, output: Output) -> None:
        """An output, or a part of one, is complete. Only ranks that own outputs are told."""

    @property
    def parts(self) -> tuple[Observer, ...]:
        """The observers of which this one consists."""
        return (self,)

    def overrides(self, method: str) -> bool:
        """Whether this observer does something in a method."""
        return getattr(type(self), method) is not getattr(Observer, method)


class Observers(Observer):
    """Several observers as one. Each is called only for the methods that it overrides.

    Args:
        parts: in the order in which they are told; contexts are entered in this order and left in the other.
    """

    def __init__(self, parts: Iterable[Observer]) -> None:
        self._parts = tuple(parts)
        self.sees_every_wait = any(part.sees_every_wait for part in self._parts)
        methods = [name for name in vars(Observer) if callable(getattr(Observer, name)) and not name.startswith("_")]
        self._methods: dict[str, tuple[Callable[..., Any], ...]] = {
            name: tuple(getattr(part, name) for part in self._parts if part.overrides(name)) for name in methods
        }

    @property
    def parts(self) -> tuple[Observer, ...]:
        """The observers, in their order."""
        return self._parts

    def overrides(self, method: str) -> bool:
        """Whether one of the observers does something in a method."""
        return any(part.overrides(method) for part in self._parts)

    def _tell(self, method: str, *args: Any) -> None:
        for tell in self._methods[method]:
            tell(*args)

    def status(self, status: Status) -> None:
        """Tell each observer."""
        self._tell("status", status)

    def waiting(self, awaited: Awaited) -> AbstractContextManager[None]:
        """Enter the contexts of all observers."""
        return together([method(awaited) for method in self._methods["waiting"]])

    def sending(self, message: Sending) -> AbstractContextManager[None]:
        """Enter the contexts of all observers."""
        return together([method(message) for method in self._methods["sending"]])

    def point(self, point: str, level: str, plugin: str) -> Around | None:
        """Combine the functions of the observers that return one."""
        return joint([method(point, level, plugin) for method in self._methods["point"]])

    def block(self, index: int) -> Around | None:
        """Combine the functions of the observers that return one."""
        return joint([method(index) for method in self._methods["block"]])

    def rows(self, place: int, rows: torch.Tensor, context: ForwardContext) -> None:
        """Tell each observer."""
        self._tell("rows", place, rows, context)

    def step_latents(self, step: int, latents: torch.Tensor) -> None:
        """Tell each observer."""
        self._tell("step_latents", step, latents)

    def latents(self, latents: torch.Tensor) -> None:
        """Tell each observer."""
        self._tell("latents", latents)

    def engine_built(self, seconds: float) -> None:
        """Tell each observer."""
        self._tell("engine_built", seconds)

    def engine_closed(self) -> None:
        """Tell each observer."""
        self._tell("engine_closed")

    def job_started(self, job: Job) -> None:
        """Tell each observer."""
        self._tell("job_started", job)

    def step_done(self, step: int, steps: int) -> None:
        """Tell each observer."""
        self._tell("step_done", step, steps)

    def job_done(self, job: Job, phases: Mapping[str, tuple[float, float]]) -> None:
        """Tell each observer."""
        self._tell("job_done", job, phases)

    def output_done(self, output: Output) -> None:
        """Tell each observer."""
        self._tell("output_done", output)


def combined(observers: Iterable[Observer | None]) -> Observer:
    """Combine observers into one, leaving out None. Without any, the result does nothing."""
    parts = [
        part for observer in observers if observer is not None for part in observer.parts if type(part) is not Observer
    ]
    return parts[0] if len(parts) == 1 else Observers(parts) if parts else Observer()


def together(contexts: Sequence[AbstractContextManager[None]]) -> AbstractContextManager[None]:
    """Combine contexts into one."""
    return contexts[0] if len(contexts) == 1 else _nested(contexts) if contexts else UNSEEN


def joint(arounds: Iterable[Around | None]) -> Around | None:
    """Combine functions that make contexts into one, leaving out None; None if none is left."""
    wanted = [around for around in arounds if around is not None]
    if len(wanted) < 2:
        return wanted[0] if wanted else None
    return lambda: together([around() for around in wanted])


@contextmanager
def _nested(contexts: Sequence[AbstractContextManager[None]]) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield
