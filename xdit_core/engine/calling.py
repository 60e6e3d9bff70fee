"""Prepare a call of the pipeline: its arguments and its scheduler."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from xdit_core.checkpoints.schedulers import check_scheduler
from xdit_core.errors import PlanRefused, UsageError
from xdit_core.model_spec import ModelSpec
from xdit_core.observe.observer import Observer
from xdit_core.observe.status import Phase, Status
from xdit_core.planning.signatures import argument_names
from xdit_core.points.request import Job
from xdit_core.settings import RunSettings


def call_arguments(run: RunSettings, spec: ModelSpec, job: Job, configs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the shared settings and what to draw as arguments of the pipeline's ``__call__``.

    Args:
        configs: of the pipeline's components, by name.
    """
    numbers = job.numbers
    named = {
        key: word
        for key, word in argument_names(spec).items()
        if key not in ("images", "seed", "output_type", spec.request.subject)
    }
    images = argument_names(spec)["images"]
    texts = [job.texts[i] for i in numbers] if job.texts else [job.prompt]
    each, subject = len(numbers) // len(texts), argument_names(spec)[spec.request.subject]
    encode = spec.request.encode_subject
    values: list[Any] = [encode(configs, text, each) for text in texts] if encode else texts
    if len(values) == 1:
        subjects = values[0]
    else:
        subjects = [x for value in values for x in (value if isinstance(value, list) else [value])]
    pictures = {images: each} if images else {}
    settings = {word: value for key, word in named.items() if word and (value := getattr(run, key, None)) is not None}
    negative = named.get("negative")
    if len(texts) > 1 and negative in settings:  # not all pipelines repeat it for each text
        settings[negative] = [job.negatives[i] if job.negatives else run.negative for i in numbers]
    elif job.negatives and negative:
        settings[negative] = job.negatives[numbers.start]
    generators = [torch.Generator("cpu").manual_seed(run.seed_of(i) % 2**64) for i in numbers]
    latent = run.output_type == "latent" and spec.request.latent_output
    output = {"output_type": "latent" if latent else "pil"}
    return {**settings, subject: subjects, **pictures, "generator": generators, **output}


def call_values(more: Mapping[str, Any], numbers: range, images: int) -> dict[str, Any]:
    """Return further arguments for some of the pictures of a prompt, with the latents of these pictures only.

    Args:
        more: values by name.
        numbers: the pictures that are drawn now.
        images: how many pictures the prompt has.

    Raises:
        UsageError: the latents are not for that many pictures.
    """
    latents = more.get("latents")
    if latents is None:
        return dict(more)
    if not isinstance(latents, torch.Tensor) or latents.dim() == 0 or latents.shape[0] != images:
        has = f"{latents.shape[0]}" if isinstance(latents, torch.Tensor) and latents.dim() else "none"
        raise UsageError(
            f"call.latents must be a tensor of the noise of {images} pictures, one behind the other, and is for "
            f"{has}; set images= too."
        )
    return {**more, "latents": latents[numbers.start : numbers.stop]}


def without_texts(arguments: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out texts whose embeddings are given: ``prompt_embeds`` replaces ``prompt``."""
    replaced = {
        name.removesuffix("_embeds") for name, value in more.items() if name.endswith("_embeds") and value is not None
    }
    return {name: value for name, value in arguments.items() if name not in replaced}


class Schedulers:
    """The scheduler of a pipeline, which the plan or a request may replace by one of another class.

    Args:
        pipe: the pipeline, with the scheduler of its checkpoint.
        name: class that the plan names, None for that of the checkpoint.

    Raises:
        PlanRefused: diffusers has no such class, or it does not fit what the model predicts.
    """

    def __init__(self, pipe: Any, name: str | None) -> None:
        self._pipe = pipe
        self._own: Any = getattr(pipe, "scheduler", None)
        if name is not None:
            pipe.scheduler = self._named(name)

    @contextmanager
    def of_request(self, name: str | None) -> Iterator[None]:
        """Use another scheduler inside the block; None leaves that of the plan.

        Raises:
            PlanRefused: as of the class.
        """
        before = getattr(self._pipe, "scheduler", None)
        if name is not None:
            self._pipe.scheduler = self._named(name)
        try:
            yield
        finally:
            if name is not None:
                self._pipe.scheduler = before

    def _named(self, name: str) -> Any:
        import diffusers

        problems = check_scheduler(name, {**self._own.config, "_class_name": type(self._own).__name__})
        if problems:
            raise PlanRefused(problems)
        return getattr(diffusers, name).from_config(self._own.config)


class StepLoop:
    """Takes the place of the progress bar that the pipeline iterates over, or whose ``update`` it calls each step.

    Args:
        steps: what the pipeline iterates over, None if it calls `update` instead.
        total: the number of steps, if ``steps`` is None.
        before: called before each step, with the number of steps that are done; leaves the pipeline by an exception.
        progress: called with ``(step, steps)`` after each step.
        observer: told the status.
        done: called when the loop has come to its end.
    """

    def __init__(
        self,
        steps: Any,
        total: int,
        before: Callable[[int], None],
        progress: Callable[[int, int], None],
        observer: Observer,
        done: Callable[[], None],
    ) -> None:
        self._steps, self.total, self.n = steps, total if steps is None else len(steps), 0
        self._before, self._progress, self._observer, self._done = before, progress, observer, done
        self._begin(1)

    def __enter__(self) -> StepLoop:
        return self

    def __exit__(self, kind: Any, *details: Any) -> None:
        if kind is None:
            self._done()

    def __iter__(self) -> Iterator[Any]:
        with self:
            for step in self._steps:
                yield step
                self.update()

    def update(self, n: int = 1) -> None:
        """One step is done."""
        self.n += n
        self._progress(self.n, self.total)
        self._begin(self.n + 1)

    def _begin(self, step: int) -> None:
        self._observer.status(Status(Phase.DENOISING, step=min(step, self.total), steps=self.total))
        if step <= self.total:
            self._before(step - 1)

    def set_postfix(self, *args: Any, **kwargs: Any) -> None:
        """Accepted for pipelines that show more."""
