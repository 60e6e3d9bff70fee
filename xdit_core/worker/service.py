"""A rank that answers requests: it takes them from its control connection, and reports what happens.

Messages to a rank: ``{"request": ID, "prompts": [...], "settings": {...}, "previews": N, "trace": true}`` to draw,
``{"request": ID, "arguments": SAFETENSORS, "grid": [ROWS, COLUMNS]}`` for one call of the denoiser, ``{"cancel": ID}``
and ``{"stop": true}``. Messages of a rank: ``{"ready": SECONDS}`` once, then for each request some of
``{"id": ID, "event": NAME, ...}`` and at last ``{"id": ID, "event": "end", "outcome": "done" | "failed" | "cancelled",
...}``. Every rank reports the end; the rest comes from the ranks that own pictures.
"""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Mapping
from typing import Any

import torch

from xdit_core.engine.engine import Engine
from xdit_core.errors import RequestCancelled, UsageError, XditError
from xdit_core.faults import lost_peer, no_memory
from xdit_core.observe.observer import Observer
from xdit_core.observe.status import Phase, Status
from xdit_core.observe.trace_files import RequestTraces
from xdit_core.points.request import Job, Output
from xdit_core.worker.control import ControlLink
from xdit_core.worker.previews import PreviewMap, denoised
from xdit_core.worker.progress import Progress

PREVIEW_SIDE = 256  # pixels of the longer side of a preview, at most


class Reporter(Observer):
    """Tells the other end of the control connection what happens to the request that is answered.

    Args:
        control: where to.
        owner: this rank owns pictures.
        frame_dim: as of ``PreviewMap``.
    """

    def __init__(self, control: ControlLink, owner: bool, frame_dim: int | None = None) -> None:
        self.control, self.request, self._owner = control, "", owner
        self.engine: Engine | None = None
        self._previews, self._map = 0, PreviewMap(frame_dim)
        self._grid, self._steps = (1, 1), 1
        self._job: Job | None = None
        self._latents: torch.Tensor | None = None

    def begin(self, request: str, previews: int, grid: tuple[int, int]) -> None:
        """A request begins.

        Args:
            request: its id.
            previews: how many previews of each call of the pipeline are wanted.
            grid: rows and columns of tokens of a picture.
        """
        self.request, self._previews, self._grid = request, previews, grid

    def forget(self) -> None:
        """Drop what belongs to the request."""
        self._job, self._latents = None, None

    def tell(self, event: str, **more: Any) -> None:
        """Report an event of the request."""
        self.control.send({"id": self.request, "event": event, **more})

    def job_started(self, job: Job) -> None:
        """Report that a prompt is encoded."""
        self._job, self._latents = job, None
        if self._owner:
            self.tell("encoding", prompt=job.index, numbers=bounds(job.numbers))

    def step_done(self, step: int, steps: int) -> None:
        """Report a step."""
        self._steps = steps
        if self._owner and self._job is not None:
            self.tell("step", prompt=self._job.index, numbers=bounds(self._job.numbers), step=step, steps=steps)

    def step_latents(self, step: int, latents: torch.Tensor) -> None:
        """Report a preview, if this is one of the steps that are shown."""
        before, self._latents = self._latents, latents
        last = self._steps - 2  # the steps behind it are told when the picture is nearly there
        if self._job is None or not 0 < step <= last:
            return
        shown = min(self._previews, last)
        if step * (shown + 1) // (last + 1) == (step - 1) * (shown + 1) // (last + 1):
            return
        clean = denoised(latents, before, self._sigmas(), step)
        for i, number in enumerate(self._job.numbers):
            picture = self._map.picture(clean[i], self._grid)
            if picture is not None:
                data = png(enlarged(picture))
                self.tell("preview", prompt=self._job.index, number=number, step=step, steps=self._steps, png=data)

    def _sigmas(self) -> Any:
        """The noise levels of the scheduler, None if its steps do not follow a slope in them."""
        scheduler: Any = getattr(getattr(self.engine, "pipe", None), "scheduler", None)
        sigmas = getattr(scheduler, "sigmas", None)
        return None if hasattr(scheduler, "alphas_cumprod") or not isinstance(sigmas, torch.Tensor) else sigmas

    def predicted(self, prediction: torch.Tensor) -> None:
        """Report what one call of the denoiser gave.

        Raises:
            XditError: it is not a number.
        """
        from safetensors.torch import save

        if not torch.isfinite(prediction).all():
            raise XditError("the prediction came out as not a number or infinite; use dtype=bfloat16 or float32.")
        if self._owner:
            data = base64.b64encode(save({"prediction": prediction.cpu().contiguous()})).decode()
            self.tell("prediction", prompt=0, number=0, safetensors=data)

    def output_done(self, output: Output) -> None:
        """Report finished pictures or latents, and let previews learn from them."""
        seconds = {name: round(value, 4) for name, value in output.seconds.items()}
        if output.latents is not None:
            from safetensors.torch import save

            # numpy, with which the parts of several ranks are joined, has no bfloat16
            latents = output.latents.float() if output.latents.dtype == torch.bfloat16 else output.latents
            data = base64.b64encode(save({"latents": latents.cpu().contiguous()})).decode()
            self.tell("latents", prompt=output.index, numbers=bounds(output.numbers), safetensors=data, seconds=seconds)
            return
        for i, (number, picture) in enumerate(zip(output.numbers, output.images or (), strict=False)):
            frames = picture if isinstance(picture, list) else [picture]
            self.tell(
                "picture",
                prompt=output.index,
                number=number,
                frames=[png(frame) for frame in frames],
                video=isinstance(picture, list),
                seconds=seconds,
            )
            if self._latents is not None and i < len(self._latents):
                self._map.learn(self._latents[i], frames[0], self._grid)
        self._latents = None


def bounds(numbers: range) -> list[int]:
    """The first of some pictures, and the one behind the last, for JSON."""
    return [numbers.start, numbers.stop]


def png(picture: Any) -> str:
    """A PIL picture as PNG in base64."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode()


def enlarged(picture: Any) -> Any:
    """A small picture, enlarged by a whole number while it stays below ``PREVIEW_SIDE``."""
    times = max(1, PREVIEW_SIDE // max(picture.size))
    return picture.resize((picture.width * times, picture.height * times), resample=2) if times > 1 else picture


def serve(engine: Engine, control: ControlLink, reporter: Reporter, beat: Observer) -> None:
    """Answer requests until the other end says stop or goes away.

    Raises:
        Exception: a request failed such that the ranks no longer agree on what was sent.
    """
    reporter.engine = engine
    beat.status(Status(Phase.READY))  # first: a rank that ends as soon as it is known to be ready was ready
    traces = RequestTraces(engine.trace, engine.rank)
    control.send({"ready": round(engine.load_seconds, 3)})
    while True:
        message = control.receive()
        if message is None or "stop" in message:
            return
        if "request" in message:
            answer(engine, control, reporter, message, traces)
            beat.status(Status(Phase.READY))


def answer(
    engine: Engine, control: ControlLink, reporter: Reporter, message: Mapping[str, Any], traces: RequestTraces
) -> None:
    """Answer one request.

    Raises:
        Exception: it failed such that the engine cannot be used again.
    """
    request, settings = str(message["request"]), dict(message.get("settings", {}))
    side, run = engine.plan.facts.pixels_per_token, engine.plan.run
    height, width = settings.get("height") or run.height or 0, settings.get("width") or run.width or 0
    reporter.begin(request, int(message.get("previews", 0)), (int(height) // side, int(width) // side))
    cancelled = False

    def asked() -> bool:
        nonlocal cancelled
        while (other := control.waiting()) is not None:
            cancelled = cancelled or other.get("cancel") == request or "stop" in other
        return cancelled or control.closed

    started = time.perf_counter()

    def end(outcome: str, **more: Any) -> None:
        seconds = round(time.perf_counter() - started, 4)
        reporter.tell("end", outcome=outcome, seconds=seconds, peak=Progress.peak(), **more)

    try:
        if "arguments" in message:
            from safetensors.torch import load

            rows, columns = message["grid"]
            reporter.predicted(engine.predict(load(base64.b64decode(message["arguments"])), (rows, columns)))
        else:
            if message.get("trace"):
                traces.begin()
            engine.generate_all(message["prompts"], cancelled=asked, **settings)
            if record := traces.record():
                reporter.tell("trace", prompt=0, record=record.to_json())
    except RequestCancelled:
        end("cancelled")
    except Exception as error:
        usable = not (engine.broken or lost_peer(error) or no_memory(error))
        refused = isinstance(error, (UsageError, ValueError, TypeError))
        text = str(error) if isinstance(error, XditError) else f"{type(error).__name__}: {' '.join(str(error).split())}"
        end("failed", error=text, refused=refused, usable=usable)
        if not usable:
            raise
    else:
        end("done")
    finally:
        reporter.forget()
        traces.drop()
