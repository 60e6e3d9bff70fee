"""What a dry run says: all that a first-time user asks before waiting for a picture, and nothing twice."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
from click.testing import Result

from xdit_core.plan import Plan
from xdit_core.planning.planner import make_plan
from xdit_core.settings import parse_words
from xdit_launcher.backends import registry
from xdit_launcher.commands.show import plan_lines

Say = Callable[..., Result]


def lines_of(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


def test_precision_device_threads_and_exactness(
    say: Say, tiny: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a plan that does not say in what it computes, and whether the picture will be another."""
    monkeypatch.setattr("xdit_core.machine.cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    lines = lines_of(say("--dry-run", *tiny, "a fox", "--plugins", "usp", "usp.ulysses=2").stdout)
    assert "runs in float32 on cpu, 4 CPU threads each" in lines
    assert "exactness the picture of one process, within rounding" in lines
    lines = lines_of(say("--dry-run", *tiny, "a fox", "--plugins", "pipefusion", "dtype=bfloat16", "threads=1").stdout)
    assert "runs in bfloat16 on cpu, 1 CPU thread each" in lines
    assert "exactness displaced (pipefusion): the picture differs a little from that of one process" in lines
    lines = lines_of(say("--dry-run", *tiny, "a fox", "--hosts", "a:1").stdout)
    assert "runs in float32 on cpu, each host's cores shared among the threads of its processes" in lines


def test_nothing_is_said_twice(say: Say, tiny: tuple[str, ...]) -> None:
    """Guards against lines such as ``1 process: one process``, a note that repeats the mesh, and a list of the only
    rank."""
    lines = lines_of(say("--dry-run", *tiny, "a fox").stdout)
    assert (
        "plugins none" in lines and "mesh one process" in lines and "exactness the picture of plain diffusers" in lines
    )
    assert not any(line.startswith(("note", "rank 0")) for line in lines) and "runs in float32 on cpu," in " ".join(
        lines
    )
    lines = lines_of(say("--dry-run", *tiny, "a fox", "--plugins", "usp", "usp.ulysses=2").stdout)
    assert "mesh 2 processes: ulysses 2" in lines and "note 2 processes: ulysses 2" not in lines
    lines = lines_of(say("--dry-run", *tiny, "a fox", "--plugins", "usp,cfg", "usp.ulysses=1", "nproc=2").stdout)
    assert any(line.startswith("note usp has nothing to divide") for line in lines)  # what is new is said


def test_a_video_has_a_length(tiny: tuple[str, ...]) -> None:
    plan = make_plan([], parse_words([*tiny, "prompt=a fox"]))

    def shown(facts: dict[str, int], run: dict[str, int | None]) -> list[str]:
        video: Plan = dataclasses.replace(
            plan, facts=dataclasses.replace(plan.facts, **facts), run=dataclasses.replace(plan.run, **run)
        )
        on, _ = registry.choose("local", {}, {})
        return lines_of("\n".join(plan_lines(video, [], [], on)))

    assert "video 32 x 32, 81 frames at 16 a second (5.1 s), 3 steps, guidance 7, seed 0" in shown(
        {"frame_step": 4}, {"frames": 81, "fps": None}
    )
    lines = shown({"frame_step": 4, "blocks": 0, "heads": 0}, {"frames": 1, "fps": 8, "images": 2})
    assert "video 32 x 32, 1 frame at 8 a second (0.1 s), 3 steps, guidance 7, seed 0" in lines
    assert "prompt a fox (2 videos)" in lines
    assert not any(line.startswith("blocks") for line in lines)  # of a U-Net, which is not a list of blocks
