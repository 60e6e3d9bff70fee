"""Requests that wait and fit together become one call of the pipeline; each gets what it would get alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load

from xdit_core import RequestCancelled
from xdit_launcher import Gang
from xdit_launcher.gang.batch import next_batch
from xdit_launcher.gang.gang import Answer
from xdit_launcher.gang.job import GangRequest, Job, RequestFailed

LATENT = {"output_type": "latent", "steps": 3}


@pytest.fixture(scope="module")
def gang(tiny_sd3_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gang]:
    """Two ranks, each of which draws half of the pictures of a batch."""
    base = {"model": "sd3", "model.path": str(tiny_sd3_folder), "max_sequence_length": 5, "device": "cpu", "threads": 1}
    runs = str(tmp_path_factory.mktemp("runs"))
    with Gang(["dp"], {**base, "steps": 4, "dp.degree": 2, "runs": runs}, batch=6) as started:
        yield started


def busy(gang: Gang) -> Job:
    """A request that keeps the ranks busy while others come; cancel it."""
    job = gang.submit("a grey mouse", steps=500)
    next(e for e in job.events(timeout=60) if e.kind == "step")
    return job


def latents(job: Job) -> Any:
    return load(job.result(timeout=60)[0].latents or b"")["latents"]


def begun(job: Job) -> float:
    return next(e.at for e in job.events() if e.kind == "started")


def ended(job: Job) -> float:
    return next(e.at for e in job.events() if e.kind in ("done", "failed", "cancelled"))


def test_each_gets_what_it_would_get_alone(gang: Gang) -> None:
    asked = [
        ("a red fox", {"seed": 5}),
        ("a green frog in the rain", {"seed": [9, 2]}),
        ("a blue bird", {"seed": 7, "images": 2}),
        ("a heron", {"seed": 1, "negative": "rain"}),
        ("a snail", {"seed": 2, "negative": "snow"}),
        ("a bee", {"seed": 3, "width": 40}),
    ]
    first = busy(gang)
    jobs = [gang.submit(prompt, **LATENT, **changes) for prompt, changes in asked]
    first.cancel()
    together = [latents(job) for job in jobs]
    groups = [jobs[:3], jobs[3:5], jobs[5:]]  # what differs beside prompt, seeds and negative prompts is drawn apart
    for group, following in zip(groups, [*groups[1:], []], strict=True):
        assert max(map(begun, group)) <= min(map(ended, group))
        assert all(begun(job) >= max(map(ended, group)) for job in following)
    for (prompt, changes), got in zip(asked, together, strict=True):
        alone = latents(gang.submit(prompt, **LATENT, **changes))
        assert got.shape == alone.shape
        assert np.abs(got - alone).max() <= 1e-5 * max(1.0, np.abs(alone).max())


def test_pictures_and_steps_reach_their_own_request(gang: Gang) -> None:
    first = busy(gang)
    jobs = [gang.submit(prompt, steps=6, seed=seed, previews=1) for prompt, seed in (("a fox", 1), ("a frog", 2))]
    first.cancel()
    for job, (prompt, seed) in zip(jobs, (("a fox", 1), ("a frog", 2)), strict=True):
        (result,) = job.result(timeout=60)
        told = [(e.kind, e.number, e.step) for e in job.events() if e.kind in ("step", "picture")]
        assert told == [*(("step", 0, step) for step in range(1, 7)), ("picture", 0, 0)]
        assert (result.prompt, result.pictures[0].seed) == (prompt, seed)
        alone = gang.generate(prompt, steps=6, seed=seed)
        difference = np.asarray(result.images[0], dtype=int) - np.asarray(alone.images[0], dtype=int)
        assert np.abs(difference).max() <= 1


def test_one_that_is_cancelled_leaves_the_others(gang: Gang) -> None:
    first = busy(gang)
    jobs = [gang.submit("a fox", steps=40, seed=seed) for seed in range(3)]
    first.cancel()
    next(e for e in jobs[0].events(timeout=60) if e.kind == "step")
    jobs[1].cancel()
    with pytest.raises(RequestCancelled):
        jobs[1].result(timeout=60)
    assert not jobs[0].ended and len(jobs[0].result(timeout=60)[0].pictures) == 1
    assert len(jobs[2].result(timeout=60)[0].pictures) == 1
    jobs = [gang.submit("a fox", steps=400, seed=seed) for seed in range(2)]
    for job in jobs:
        job.cancel()
    for job in jobs:
        with pytest.raises(RequestCancelled):
            job.result(timeout=60)


def waiting(*ids: str, **settings: Any) -> list[Job]:
    return [Job(id, GangRequest((f"prompt {id}",), settings), (int(id),)) for id in ids]


def test_a_batch_that_fails_is_drawn_one_by_one() -> None:
    jobs = waiting("1", "2", "3")
    queue = deque(jobs)
    batch = next_batch(queue, 4)
    assert batch is not None and batch.jobs == tuple(jobs) and not queue
    message = batch.begin()
    assert [event.together for event in jobs[0]._events] == [0, 3]
    assert message["prompts"] == [["prompt 1", "prompt 2", "prompt 3"]] and message["settings"]["seed"] == [1, 2, 3]
    jobs[1].cancel()
    assert not batch.end_cancelled() and jobs[1].status == "cancelled"
    answer = Answer(batch, world=1)
    answer.take(0, {"event": "end", "outcome": "failed", "error": "not a number.", "refused": False})
    queue.extend(answer.finish())
    assert list(queue) == [jobs[0], jobs[2]]
    for job in (jobs[0], jobs[2]):
        batch = next_batch(queue, 4)
        assert batch is not None and batch.jobs == (job,)
        answer = Answer(batch, world=1)
        answer.take(0, {"event": "end", "outcome": "failed", "error": "not a number.", "refused": False})
        assert answer.finish() == []
        with pytest.raises(RequestFailed, match="not a number"):
            job.result(timeout=1)


def test_what_fits_together() -> None:
    def sizes(jobs: list[Job], most: int) -> list[int]:
        queue, found = deque(jobs), []
        while batch := next_batch(queue, most):
            found.append(len(batch.jobs))
        return found

    assert sizes(waiting("1", "2", "3", "4", "5"), 2) == [2, 2, 1]
    assert sizes(waiting("1", "2"), 1) == [1, 1]
    assert sizes([*waiting("1", steps=3), *waiting("2", steps=4), *waiting("3", steps=3)], 8) == [2, 1]
    assert sizes([*waiting("1", negative="a"), *waiting("2"), *waiting("3", negative="b")], 8) == [2, 1]
    assert sizes(waiting("1", "2", call={"clip_skip": 1}), 8) == [1, 1]
    several = Job("1", GangRequest(("a", "b"), {}), (0,))
    assert sizes([several, *waiting("2", "3")], 8) == [1, 2]
    gone = waiting("1", "2", "3")
    gone[0].cancel()
    assert sizes(gone, 8) == [2] and gone[0].status == "cancelled"
