"""``--trace`` and ``--profile`` as a user has them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

Launch = Callable[..., Any]


@pytest.mark.slow
def test_trace_and_profile(launch: Launch, tiny: tuple[str, ...]) -> None:
    run = launch("--profile", "--plugins", "usp", "usp.ulysses=2", *tiny, "a red fox")
    code, out, err = run.wait(120)
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0].startswith("out.png  ") and lines[1].split()[:3] == ["rank", "host", "seconds"]
    names = {path.name for path in run.run_folder.iterdir()}
    assert {"trace.json", "summary.txt", "timeline.png", "rank0.profile.json", "rank1.profile.json"} <= names
    for name in ("trace.json", "rank1.profile.json"):
        assert json.loads((run.run_folder / name).read_text())["traceEvents"]
    about = json.loads((run.folder / "out.json").read_text())["plan"]["settings"]
    assert not {"trace", "profile"} & about.keys()  # they do not make the picture


def test_flags_are_settings(say: Callable[..., Result], tiny: tuple[str, ...]) -> None:
    """A flag gives the same plan as its setting, which differs from the plan without it in that setting alone."""

    def plan(*words: str) -> dict[str, Any]:
        shown: dict[str, Any] = json.loads(say(*words, "--dry-run", "--json", *tiny, "a").stdout)
        return shown

    plain = plan()
    for name in ("trace", "profile"):
        watched = plan(f"--{name}")
        assert watched == plan(f"{name}=yes")
        assert watched["run"].pop(name) is True and watched["values"].pop(name)
        assert plain["run"][name] is False
        assert watched == {**plain, "run": {k: v for k, v in plain["run"].items() if k != name}}
    assert not Path("runs").exists()
