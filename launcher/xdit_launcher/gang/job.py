"""A request to a gang, what happens to it, and what it gave. Without torch."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from xdit_core.errors import RequestCancelled, XditError
from xdit_core.observe.spans import Record
from xdit_core.observe.timeline import chrome

ENDS = ("done", "failed", "cancelled")


class RequestFailed(XditError):
    """A request could not be answered; the gang goes on.

    Args:
        refused: the request asked for something that is not possible, rather than something having gone wrong.
    """

    def __init__(self, sentence: str, refused: bool = False) -> None:
        super().__init__(sentence)
        self.refused = refused


class GangEnded(XditError):
    """The ranks have ended, so the request could not be answered."""


@dataclass(frozen=True)
class GangRequest:
    """What a gang is asked for.

    Args:
        prompts: what to draw: each a text, or a list with a text for each picture.
        settings: any of ``xdit_core.planning.requests.PER_REQUEST``, and ``call``, as of ``Engine.generate``.
        previews: how many previews of each picture are wanted.
        trace: a trace of all ranks is wanted.
        arguments: instead of all these, safetensors with the arguments of one call of the denoiser.
        grid: of this call, rows and columns of tokens.
    """

    prompts: tuple[str | Sequence[str], ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    previews: int = 0
    trace: bool = False
    arguments: bytes = b""
    grid: tuple[int, int] = (1, 1)


@dataclass(frozen=True)
class Event:
    """Something that happened to a request.

    Args:
        kind: ``accepted``, ``started``, ``encoding``, ``step``, ``preview``, ``picture``, ``latents``,
            ``prediction``, ``done``, ``failed`` or ``cancelled``.
        at: ``time.time()``.
        prompt: index of the prompt that it is about.
        number: of the picture of this prompt.
        step, steps: of the pipeline; ``step`` counts from 1.
        data: PNG of a preview; safetensors of latents or of a prediction; of a picture its PNG, of a video its first
            frame.
        text: why the request failed.
        together: of ``started``: how many requests are drawn at once.
        peak: of ``done``: the most memory in bytes that a rank has used so far.
    """

    kind: str
    at: float
    prompt: int = 0
    number: int = 0
    step: int = 0
    steps: int = 0
    data: bytes = b""
    text: str = ""
    together: int = 0
    peak: int = 0


@dataclass
class Picture:
    """One picture, or one video as its frames.

    Args:
        frames: PNG of the picture, or of each frame.
        video: it is a video, even if it has one frame.
        seed: of its noise.
    """

    frames: tuple[bytes, ...]
    video: bool = False
    seed: int = 0

    @property
    def image(self) -> Any:
        """The PIL picture, or for a video the list of its frames."""
        from PIL import Image

        pictures = [Image.open(io.BytesIO(frame)) for frame in self.frames]
        return pictures if self.video else pictures[0]


@dataclass
class Result:
    """What one prompt gave.

    Args:
        prompt: what was drawn; of a list of texts the first.
        pictures: in order of their numbers.
        latents: safetensors with the tensor ``latents``, if latents were asked for.
        seconds: of encode, denoise and decode, the longest of all ranks.
        trace: what every rank did and when, as JSON for ui.perfetto.dev, if it was asked for.
    """

    prompt: str
    pictures: list[Picture] = field(default_factory=list)
    latents: bytes | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    trace: bytes | None = None

    @property
    def images(self) -> list[Any]:
        """PIL pictures, or for each video the list of its frames."""
        return [picture.image for picture in self.pictures]


class Job:
    """A request on its way. Every method may be called from any thread.

    Args:
        id: names it.
        request: what was asked for.
        seeds: of the pictures of each prompt.
        look: called when something is wanted of the gang.

    Attributes:
        alone: not to be drawn together with other requests.
    """

    def __init__(
        self, id: str, request: GangRequest, seeds: tuple[int, ...], look: Callable[[], None] = lambda: None
    ) -> None:
        self._look = look
        self.id, self.request, self.seeds = id, request, seeds
        self.cancel_wanted = self.alone = False
        self._changed = threading.Condition()
        self._events: list[Event] = []
        self._pictures: dict[tuple[int, int], Picture] = {}
        self._latents: dict[int, list[tuple[int, bytes]]] = {}
        self._seconds: dict[int, dict[str, float]] = {}
        self._records: list[Record] = []
        self._error: XditError | None = None
        self.add("accepted")

    @property
    def status(self) -> str:
        """One of ``queued``, ``running``, ``done``, ``failed`` and ``cancelled``."""
        with self._changed:
            last = self._events[-1].kind
        return last if last in ENDS else "queued" if last == "accepted" else "running"

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen."""
        return self.status in ENDS

    def cancel(self) -> None:
        """End the request as soon as possible; it is not an error if it has ended."""
        self.cancel_wanted = True
        self._look()

    def events(self, timeout: float | None = None) -> Iterator[Event]:
        """Yield what happens, from the beginning to the end.

        Args:
            timeout: seconds to wait for each event.

        Raises:
            TimeoutError: nothing happened for so long.
        """
        i = 0
        while True:
            with self._changed:
                if not self._changed.wait_for(partial(self._has_more_than, i), timeout):
                    raise TimeoutError(f"nothing happened to request {self.id} for {timeout:g} s.")
                new, i = self._events[i:], len(self._events)
            yield from new
            if new[-1].kind in ENDS:
                return

    def _has_more_than(self, count: int) -> bool:
        return len(self._events) > count

    def result(self, timeout: float | None = None) -> list[Result]:
        """Wait for the end, and return what each prompt gave.

        Raises:
            RequestFailed: the request could not be answered.
            RequestCancelled: it was cancelled; ``outputs`` has what was finished.
            GangEnded: the ranks have ended.
            TimeoutError: it took longer than ``timeout`` seconds.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._events[-1].kind in ENDS, timeout):
                raise TimeoutError(f"request {self.id} did not end within {timeout:g} s.")
        if isinstance(self._error, RequestCancelled):
            self._error.outputs = self.results()
        if self._error is not None:
            raise self._error
        return self.results()

    def results(self) -> list[Result]:
        """What each prompt has given so far."""
        with self._changed:
            trace = chrome(sorted(self._records, key=by_rank)).encode() if self._records else None
            return [
                Result(
                    prompt if isinstance(prompt, str) else prompt[0],
                    [picture for (p, _), picture in sorted(self._pictures.items()) if p == index],
                    joined_latents([part for _, part in sorted(self._latents.get(index, []))]),
                    self._seconds.get(index, {}),
                    trace,
                )
                for index, prompt in enumerate(self.request.prompts)
            ]

    def add(self, kind: str, error: XditError | None = None, **more: Any) -> None:
        """Add an event, and forget the data of older previews; called by the gang."""
        with self._changed:
            if kind == "preview":
                drop = {"data": b""}
                self._events = [
                    Event(**{**vars(e), **drop}) if e.kind == "preview" and e.number == more["number"] else e
                    for e in self._events
                ]
            if error is not None:
                self._error, more = error, {**more, "text": str(error)}
            self._events.append(Event(kind, time.time(), **more))
            self._changed.notify_all()

    def take(self, message: Mapping[str, Any]) -> None:
        """Take a message of a rank about this request; called by the gang."""
        kind, prompt = message["event"], int(message["prompt"])
        if kind in ("picture", "latents"):
            with self._changed:
                seconds = self._seconds.setdefault(prompt, {})
                for name, value in message["seconds"].items():
                    seconds[name] = max(value, seconds.get(name, 0.0))
        if kind == "picture":
            frames = tuple(base64.b64decode(frame) for frame in message["frames"])
            number = int(message["number"])
            with self._changed:
                self._pictures[prompt, number] = Picture(frames, bool(message["video"]), self.seeds[number])
            self.add(kind, prompt=prompt, number=number, data=frames[0])
        elif kind == "latents":
            start, data = int(message["numbers"][0]), base64.b64decode(message["safetensors"])
            with self._changed:
                self._latents.setdefault(prompt, []).append((start, data))
            self.add(kind, prompt=prompt, number=start, data=data)
        elif kind == "trace":
            with self._changed:
                self._records.append(Record.from_json(message["record"]))
        elif kind == "prediction":
            self.add(kind, data=base64.b64decode(message["safetensors"]))
        elif kind == "preview":
            data = base64.b64decode(message["png"])
            step, steps = int(message["step"]), int(message["steps"])
            self.add(kind, prompt=prompt, number=int(message["number"]), step=step, steps=steps, data=data)
        else:
            step, steps = int(message.get("step", 0)), int(message.get("steps", 0))
            self.add(kind, prompt=prompt, number=int(message["numbers"][0]), step=step, steps=steps)


def by_rank(record: Record) -> int:
    """The rank of a record."""
    return record.rank


def joined_latents(parts: list[bytes]) -> bytes | None:
    """One safetensors from those of several ranks; None without any."""
    if len(parts) < 2:
        return parts[0] if parts else None
    import numpy as np
    from safetensors.numpy import load, save

    return bytes(save({"latents": np.concatenate([load(part)["latents"] for part in parts])}))
