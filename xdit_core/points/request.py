"""What a request is made of: jobs, each one call of the pipeline, and their outputs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from xdit_core.errors import XditError
from xdit_core.settings import RunSettings


@dataclass(frozen=True)
class Job:
    """Some of the pictures of one prompt, made by one call of the pipeline.

    Args:
        prompt: what to draw.
        index: which of the request's prompts.
        numbers: which of its pictures. Picture ``i`` has the seed ``RunSettings.seed_of(i)`` on every rank.
        texts: for pictures that each have a text of their own, the texts of all the pictures; ``prompt`` is the first.
        negatives: likewise what to keep out of each.
    """

    prompt: str
    index: int
    numbers: range
    texts: tuple[str, ...] = ()
    negatives: tuple[str, ...] = ()


@dataclass
class Output:
    """The result of one prompt.

    Args:
        index, numbers: as of the job.
        images: PIL pictures, or for each video the list of its frames; None on ranks that do not own the output.
        latents: ``[n, C, h, w]`` if latents were asked for, on every rank.
        seconds: wall time of encode, denoise and decode, and what strategies count apart.
        slow: operations that made every rank wait although a strategy could have gone on, with their number.
        failure: why there is neither picture nor latents, if all ranks left this call of the pipeline together.
    """

    prompt: str
    index: int = 0
    numbers: range = range(1)
    images: list[Any] | None = None
    latents: torch.Tensor | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    slow: dict[str, int] = field(default_factory=dict)
    failure: XditError | None = None


@dataclass(frozen=True)
class Request:
    """Jobs on their way through the request point.

    Args:
        jobs: what to draw.
        run: the shared settings.
        more: further arguments of the pipeline's ``__call__``.
    """

    jobs: tuple[Job, ...]
    run: RunSettings
    more: Mapping[str, Any]

    def but(self, **changes: Any) -> Request:
        """A copy with other values."""
        return replace(self, **changes)


RunRequest = Callable[[Request], list[Output]]


def jobs_for(
    prompts: Sequence[str | Sequence[str] | None],
    images: int,
    skip: Collection[tuple[int, int]] = (),
    negatives: Sequence[str] = (),
) -> tuple[Job, ...]:
    """A job for each prompt; without the pictures to skip, which are (prompt, picture), a job for each run of numbers
    that is left.

    Args:
        prompts: each a text, a text for each picture, or None where embeddings say what to draw.
        negatives: what to keep out of each picture, where they differ.
    """
    jobs = []
    for index, subject in enumerate(prompts):
        texts = () if subject is None or isinstance(subject, str) else tuple(subject)
        prompt = texts[0] if texts else str(subject or "")
        start = 0
        for number in range(images + 1):
            if number == images or (index, number) in skip:
                if start < number:
                    jobs.append(Job(prompt, index, range(start, number), texts, tuple(negatives)))
                start = number + 1
    return tuple(jobs)


def alone(job: Job) -> tuple[Job, ...]:
    """Split a job into jobs of one picture each."""
    return tuple(replace(job, numbers=job.numbers[i : i + 1]) for i in range(len(job.numbers)))


def share(jobs: Iterable[Job], start: int, stop: int) -> tuple[Job, ...]:
    """Return the jobs for pictures ``start`` to ``stop``, counted over the pictures of all jobs."""
    shared, counted = [], 0
    for job in jobs:
        low, high = max(start - counted, 0), min(stop - counted, len(job.numbers))
        if low < high:
            shared.append(replace(job, numbers=job.numbers[low:high]))
        counted += len(job.numbers)
    return tuple(shared)


def joined(outputs: Iterable[Output], in_turn: bool = False) -> list[Output]:
    """Merge outputs that are parts of the output of one prompt; return one output for each prompt, pictures in order.

    Args:
        in_turn: the parts were made one after the other, so their times are added. Otherwise they were made at the
            same time, and the longest counts.
    """
    result: list[Output] = []
    for part in sorted(outputs, key=lambda o: (o.index, o.numbers.start)):
        if not result or result[-1].index != part.index or result[-1].numbers.stop != part.numbers.start:
            result.append(replace(part))
            continue
        whole = result[-1]
        whole.numbers = range(whole.numbers.start, part.numbers.stop)
        whole.failure = whole.failure or part.failure
        if whole.images is not None and part.images is not None:
            whole.images = whole.images + part.images
        if whole.latents is not None and part.latents is not None:
            whole.latents = torch.cat((whole.latents, part.latents))
        pairs = {k: (whole.seconds.get(k, 0.0), part.seconds.get(k, 0.0)) for k in {**whole.seconds, **part.seconds}}
        whole.seconds = {k: sum(pair) if in_turn else max(pair) for k, pair in pairs.items()}
    return result
