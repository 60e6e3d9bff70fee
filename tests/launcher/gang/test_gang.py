"""A gang: ranks that stay, and answer one request after the other as fresh ranks would."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image
from safetensors.numpy import load, load_file, save_file

from xdit_core import PlanRefused, RequestCancelled, UsageError
from xdit_core.testing.runs import diffusers_latents
from xdit_launcher import Gang
from xdit_launcher.gang.job import GangEnded, Job, RequestFailed

SMALL = {"steps": 3, "seed": 5}
USP = {"usp.ulysses": 2, "usp.ring": 1}


def settings(folder: Path, runs: Path, **more: Any) -> dict[str, Any]:
    base = {"model": "sd3", "model.path": str(folder), "max_sequence_length": 5, "device": "cpu", "runs": str(runs)}
    return {**base, "steps": 4, "threads": 1, **(more or USP)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def gang(tiny_sd3_folder: Path, runs: Path) -> Iterator[Gang]:
    with Gang(["usp"], settings(tiny_sd3_folder, runs)) as started:
        yield started


def kinds(job: Job) -> list[str]:
    return [event.kind for event in job.events(timeout=60)]


def pids() -> list[int]:
    """Of the ranks that this process has started, by rank of the last gang."""
    ranks = [p for p in psutil.Process().children() if "xdit_core.worker" in " ".join(p.cmdline())]
    return [p.pid for p in sorted(ranks, key=lambda p: (p.create_time(), p.pid))]


def test_latents_equal_those_of_diffusers(gang: Gang, tiny_sd3_folder: Path) -> None:
    result = gang.generate("a red fox", output_type="latent", images=2, seed=0)
    oracle = diffusers_latents(str(tiny_sd3_folder), "a red fox", num_images_per_prompt=2)
    assert result.latents is not None
    latents = load(result.latents)["latents"]
    assert np.abs(latents - oracle.numpy()).max() <= 1e-5 * max(1.0, oracle.abs().max().item())


def test_nothing_remains_of_other_requests(gang: Gang, tiny_sd3_folder: Path, runs: Path) -> None:
    """Whatever came before, a request gives what it gives to a fresh gang, bit for bit."""
    wanted = {"steps": 3, "seed": 5, "height": 24, "width": 40}
    with Gang(["usp"], settings(tiny_sd3_folder, runs)) as fresh:
        expected = fresh.generate("a red fox", **wanted).pictures
    gang.generate(["a blue bird", "a green frog"], images=2, negative="fog", guidance=3.0)
    gang.generate("a red fox", guidance=1.0, steps=2, output_type="latent")
    job = gang.submit("a red fox", steps=200)
    next(e for e in job.events(timeout=60) if e.kind == "step")
    job.cancel()
    with pytest.raises(RequestCancelled):
        job.result(timeout=60)
    with pytest.raises(RequestFailed):
        gang.generate("a red fox", height=33)
    assert gang.generate("a red fox", **wanted).pictures == expected


def test_events_tell_the_story(gang: Gang) -> None:
    job = gang.submit(["a red fox", "a blue bird"], **SMALL)
    told = kinds(job)
    one = ["encoding", "step", "step", "step", "picture"]
    assert told == ["accepted", "started", *one, *one, "done"]
    steps = [(e.prompt, e.step, e.steps) for e in job.events() if e.kind == "step"]
    assert steps == [(prompt, step, 3) for prompt in (0, 1) for step in (1, 2, 3)]
    assert [picture.seed for result in job.result() for picture in result.pictures] == [5, 5]
    assert {"encode", "denoise", "decode"} <= set(job.result()[0].seconds)
    ends = list(job.events())
    assert ends[1].together == 1 and ends[-1].peak > 2**20
    assert kinds(job) == told and job.status == "done"  # again, from the beginning


def test_a_trace_is_made_for_the_requests_that_ask(gang: Gang, tiny_sd3_folder: Path, runs: Path) -> None:
    with Gang(["usp"], settings(tiny_sd3_folder, runs, **USP, trace=True)) as traced:
        plain, seen = traced.generate("a red fox", **SMALL), traced.generate("a red fox", trace=True, **SMALL)
        again = traced.generate("a red fox", trace=True, **{**SMALL, "steps": 1})
    assert plain.trace is None and plain.pictures == seen.pictures == gang.generate("a red fox", **SMALL).pictures
    assert json.loads(seen.trace)["displayTimeUnit"] == "ms"
    for trace, steps in ((seen.trace, 3), (again.trace, 1)):
        spans = [event for event in json.loads(trace)["traceEvents"] if event["ph"] == "X"]
        for rank in (0, 1):
            names = [event["name"] for event in spans if event["pid"] == rank]
            assert names.count("denoise") == 1 and sum(name.startswith("step ") for name in names) == steps
    with pytest.raises(UsageError, match="trace=yes"):
        gang.submit("a red fox", trace=True)


def test_seeds_count_the_pictures(gang: Gang) -> None:
    result = gang.generate("a red fox", steps=2, seed=[9, 5])
    assert [picture.seed for picture in result.pictures] == [9, 5]
    alone = gang.generate("a red fox", steps=2, seed=[5]).pictures[0]
    with pytest.raises(RequestFailed, match="seed"):
        gang.generate("a red fox", seed=[])
    assert alone.seed == 5 and result.images[1].size == alone.image.size


def test_previews_resemble_the_picture(runs: Path) -> None:
    """Once a picture was made, the map from latents to colours is known."""
    with Gang((), {"model": "emoji", "device": "cpu", "threads": 1, "runs": str(runs)}) as gang:
        gang.generate("rocket", steps=6, seed=1)
        job = gang.submit("red heart", steps=6, seed=1, previews=3)
        shown = [(e.step, e.data) for e in job.events(timeout=60) if e.kind == "preview"]
        (result,) = job.result()
    picture = np.asarray(result.images[0].convert("RGB"), dtype=float)
    assert [step for step, _ in shown] == [2, 3, 4]
    preview = Image.open(io.BytesIO(shown[-1][1])).resize(result.images[0].size)
    difference = np.abs(np.asarray(preview, dtype=float) - picture).mean()
    assert difference < 0.5 * np.abs(picture.mean((0, 1)) - picture).mean()  # half of what its mean colour differs
    assert [e.data for e in job.events() if e.kind == "preview"][:2] == [b"", b""]  # older ones are not kept


def test_previews_change_nothing(gang: Gang) -> None:
    assert gang.submit("x", previews=2, **SMALL).result(60)[0].pictures == gang.generate("x", **SMALL).pictures


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"steps": 0}, "steps=0 is too small"),
        ({"height": 33}, "height"),
        ({"call": {"nonsense": 1}}, "no such argument"),
        ({"call": {"callback_on_step_end": 3}}, "cannot be written|is not something"),
        ({"seed": [1, 2, 3], "images": 2}, "seed"),
        ({"output_type": "tiff"}, "tiff"),
        ({"max_sequence_length": 100_000}, "max_sequence_length"),
    ],
)
def test_a_bad_value_leaves_the_gang_alive(gang: Gang, changes: dict[str, Any], sentence: str) -> None:
    before = pids()
    with pytest.raises((RequestFailed, UsageError), match=sentence):
        gang.generate("a red fox", **{**SMALL, **changes})
    assert gang.generate("a red fox", **SMALL).images and gang.alive and pids() == before


@pytest.mark.parametrize(
    ("prompts", "changes", "sentence"),
    [
        ("", {}, "there is no prompt"),
        ([], {}, "there is no prompt"),
        ("x", {"stepz": 3}, "does not take stepz"),
        ("x", {"lora": "a.safetensors"}, "there is no LoRA 'a.safetensors'; none is allowed here"),
        ("x", {"steps": "many"}, "steps=many is not a whole number"),
    ],
)
def test_what_is_wrong_alone_is_refused_at_once(gang: Gang, prompts: Any, changes: Any, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        gang.submit(prompts, **changes)


def test_requests_queue_and_a_waiting_one_can_be_cancelled(gang: Gang) -> None:
    first, second, third = (gang.submit("a red fox", steps=n) for n in (60, 3, 2))
    second.cancel()
    first.cancel()
    assert kinds(third)[-1] == "done"
    assert first.status == "cancelled" and kinds(second) == ["accepted", "cancelled"]


def test_a_cancelled_request_ends_within_two_steps(gang: Gang) -> None:
    job = gang.submit("a red fox", steps=500)
    for event in job.events(timeout=60):
        if event.kind == "step" and event.step == 3:
            job.cancel()
            asked = time.time()
    after = [e for e in job.events() if e.kind == "step" and e.at > asked + 0.2]
    assert job.status == "cancelled" and len(after) <= 2


def test_memory_stays(gang: Gang) -> None:
    def used() -> list[int]:
        return [psutil.Process(pid).memory_info().rss for pid in pids()]

    for _ in range(10):
        gang.generate("a red fox", **SMALL)
    before = used()
    for number in range(30):
        gang.generate(f"a red fox {number}", steps=2, seed=number)
    assert all(now < 1.03 * then for now, then in zip(used(), before, strict=True))


def test_a_dead_rank_ends_the_gang_with_a_report(tiny_sd3_folder: Path, runs: Path) -> None:
    with Gang(["usp"], settings(tiny_sd3_folder, runs)) as gang:
        running, waiting = gang.submit("a red fox", steps=2000), gang.submit("a blue bird")
        next(e for e in running.events(timeout=60) if e.kind == "step")
        own = pids()[-2:]
        os.kill(pids()[-1], signal.SIGKILL)
        for job in (running, waiting):
            with pytest.raises(GangEnded, match=r"rank 1 of 2 .* failed at.*\n.*killed by signal 9"):
                job.result(timeout=60)
        assert not gang.alive and "signal 9" in str(gang.error) and not set(own) & set(pids())
        with pytest.raises(GangEnded, match="signal 9"):
            gang.submit("x")


def test_an_idle_rank_that_dies_is_noticed(tiny_sd3_folder: Path, runs: Path) -> None:
    with Gang((), settings(tiny_sd3_folder, runs, nproc=1)) as gang:
        os.kill(pids()[-1], signal.SIGKILL)
        end = time.monotonic() + 20
        while gang.alive and time.monotonic() < end:
            time.sleep(0.05)
        assert not gang.alive and "ready" in str(gang.error)


def test_closing_cancels_what_is_left(tiny_sd3_folder: Path, runs: Path) -> None:
    gang = Gang(["usp"], settings(tiny_sd3_folder, runs))
    running, waiting = gang.submit("a red fox", steps=2000), gang.submit("a blue bird")
    next(e for e in running.events(timeout=60) if e.kind == "step")
    own = pids()[-2:]
    gang.close()
    assert running.status == waiting.status == "cancelled" and len(own) == 2 and not set(own) & set(pids())
    with pytest.raises(GangEnded, match="closed"):
        gang.submit("x")
    gang.close()


@pytest.mark.parametrize("interrupted", [False, True])
def test_ranks_that_load_are_ended_at_once(tiny_sd3_folder: Path, runs: Path, interrupted: bool) -> None:
    before, seen = pids(), set[int]()

    def unwanted() -> bool:  # asked as soon as the ranks are there
        seen.update(set(pids()) - set(before))
        if interrupted:
            os.kill(os.getpid(), signal.SIGINT)  # as Ctrl-C in a notebook
        return not interrupted

    with pytest.raises(KeyboardInterrupt if interrupted else GangEnded, match=None if interrupted else "they loaded"):
        Gang(["usp"], settings(tiny_sd3_folder, runs), unwanted=unwanted)
    assert pids() == before and len(seen) == 2


def test_a_plan_that_is_refused_starts_nothing(tiny_sd3_folder: Path, runs: Path) -> None:
    before = pids()
    with pytest.raises(PlanRefused, match="4 heads"):
        Gang(["usp"], settings(tiny_sd3_folder, runs, **{"usp.ulysses": 3}))
    assert pids() == before


def test_a_checkpoint_that_cannot_be_loaded_is_reported(tiny_sd3_folder: Path, runs: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(tiny_sd3_folder, tmp_path / "broken")
    weights = next((broken / "vae").glob("*.safetensors"))
    save_file({name: value.reshape(-1)[:1] for name, value in load_file(weights).items()}, weights)
    with pytest.raises(GangEnded, match="rank 0 of 1"):
        Gang((), settings(broken, runs, nproc=1))


def test_every_rank_of_dp_owns_pictures(tiny_sd3_folder: Path, runs: Path) -> None:
    chosen = settings(tiny_sd3_folder, runs, **{"dp.degree": 2})
    with Gang(["dp"], chosen) as gang:
        job = gang.submit("a red fox", images=3, **SMALL)
        (result,) = job.result(timeout=60)
        assert [picture.seed for picture in result.pictures] == [5, 6, 7]
        one = gang.generate("a red fox", steps=3, seed=7)
        assert result.pictures[2].frames == one.pictures[0].frames
        latents = gang.generate("a red fox", images=3, output_type="latent", **SMALL).latents
        assert latents is not None and load(latents)["latents"].shape[0] == 3
        long = gang.submit("a red fox", images=2, steps=2000)
        next(e for e in long.events(timeout=60) if e.kind == "step")
        long.cancel()
        with pytest.raises(RequestCancelled):
            long.result(timeout=60)
        assert gang.generate("a red fox", steps=3, seed=7).pictures == one.pictures


def test_latents_without_numbers_leave_the_gang_alive(gang: Gang) -> None:
    with pytest.raises(RequestFailed, match="not a number or infinite"):
        gang.generate("a red fox", guidance=1e38, **SMALL)
    assert gang.generate("a red fox", **SMALL).images
