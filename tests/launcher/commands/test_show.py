"""What the command line prints without starting anything, and how fast."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from xdit_core.plan import Plan

Say = Callable[..., Result]
SLOW = ("torch", "diffusers", "transformers", "numpy", "yaml", "PIL")


def imported(code: str) -> tuple[int, list[str]]:
    """Exit code of a Python snippet that runs the command line, and the slow packages that it imported."""
    tail = f"\nimport sys\nprint('IMPORTED', *[n for n in {SLOW!r} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code + tail], capture_output=True, text=True, env={**os.environ})
    return done.returncode, done.stdout.rsplit("IMPORTED", 1)[1].split()


@pytest.mark.parametrize(
    "words", [["--help"], ["run", "--help"], ["plugins"], ["plugins", "show", "usp"], ["models"], ["--version"]]
)
def test_no_slow_imports(words: list[str]) -> None:
    code = f"from xdit_launcher.cli import cli\ncli({words!r}, standalone_mode=False)"
    if "--help" in words or "--version" in words:
        code = f"from xdit_launcher.cli import cli\ntry: cli({words!r})\nexcept SystemExit as e: assert not e.code"
    assert imported(code) == (0, [])


def test_a_plan_needs_no_torch(tiny: tuple[str, ...]) -> None:
    words = ["--plugins", "usp,pipefusion", "--dry-run", *tiny, "a red fox"]
    assert imported(f"from xdit_launcher.cli import cli\ncli({words!r}, standalone_mode=False)") == (0, [])


def test_dry_run(say: Say, tiny: tuple[str, ...]) -> None:
    result = say(
        "--dry-run", *tiny, "a red fox", "--plugins", "usp", "--plugins", "pipefusion", "usp.ulysses=2", "out=pictures"
    )
    assert result.exit_code == 0, result.output
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    for line in (
        "picture 32 x 32, 3 steps, guidance 7, seed 0",
        "prompt a red fox",
        "writes pictures/a-red-fox-0.png",
        "mesh 4 processes: stages 2 x ulysses 2",
        "rank 0: stages 0, ulysses 0; blocks 0 to 1; writes the results",
        "rank 3: stages 1, ulysses 1; blocks 2 to 3",
        "patches 2 in time",
        "at trunk usp (gather) > pipefusion (stage)",
        "at attention usp (exchange) > pipefusion (cache) > usp (ring)",
        "slot tokens: usp",
    ):
        assert line in lines
    assert any("torchrun --nproc-per-node 4 -m xdit_core.worker plan.json" in line for line in lines)
    assert not Path("runs").exists() and not Path("pictures").exists()


def test_dry_run_json_is_what_a_worker_reads(say: Say, tiny: tuple[str, ...]) -> None:
    result = say("--dry-run", "--json", "--plugins", "usp", "usp.ulysses=2", *tiny, "a wall with x=y on it", "x")
    plan = Plan.from_json(result.stdout)
    assert plan.world == 2 and plan.run.prompt == ("a wall with x=y on it", "x")
    assert json.loads(result.stdout)["run"]["steps"] == 3


def test_sample_prompt(say: Say, tiny: tuple[str, ...]) -> None:
    assert "a red fox in the snow, morning light" in say("--dry-run", *tiny).stdout


def test_config_below_the_command_line(say: Say, tiny: tuple[str, ...]) -> None:
    text = "plugins: usp\nusp:\n  ulysses: 2\nseed: 0123\nguidance: 2.5\nprompt:\n  - yes\n  - 'a fox'\n"
    Path("c.yaml").write_text(text)
    plan = Plan.from_json(say("--config", "c.yaml", "--dry-run", "--json", *tiny, "guidance=4").stdout)
    assert plan.run.prompt == ("yes", "a fox") and plan.run.seed == (123,) and plan.run.guidance == 4.0
    assert plan.degree("ulysses") == 2
    other = say("--config", "c.yaml", "--plugins", "pipefusion", "--dry-run", "--json", *tiny)
    assert other.exit_code == 2 and "add it: --plugins usp" in other.stderr


def test_plugins_with_a_broken_one(say: Say) -> None:
    result = say("plugins")
    assert result.exit_code == 0
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert any(line.startswith("usp xdit 0.1.0 USP") for line in lines) and "owns tokens, exchange, ring" in lines
    assert any(line.startswith("broken: plugin broken of xdit-faulty 0.1 cannot be loaded") for line in lines)
    assert "No module named 'xdit_missing_module'" in result.stdout
    assert say("--help").exit_code == 0


def test_plugins_show(say: Say) -> None:
    lines = [" ".join(line.split()) for line in say("plugins", "show", "pipefusion").stdout.splitlines()]
    assert "setting pipefusion.warmup= int 1 synchronous steps at the start; 0: attend to what exists so far" in lines
    assert "axis stages (per stage), set by pipefusion.stages=" in lines
    assert "owns blocks: it divides the blocks among stages" in lines
    assert "broken plugin broken of xdit-faulty 0.1 cannot be loaded" in " ".join(
        say("plugins", "show", "broken").stdout.split()
    )
    assert say("plugins", "show", "ups").exit_code == 2


def test_models(say: Say) -> None:
    text = say("models").stdout
    assert any(line.split()[:2] == ["emoji", "xdit"] and line.endswith("bundled") for line in text.splitlines())
    assert "stabilityai/stable-diffusion-3-medium-diffusers" in text


def test_a_setting_written_as_an_option(say: Say) -> None:
    result = say("--ulysses_degree", "2", "model=sd3")
    assert result.exit_code == 2
    assert "no option --ulysses_degree" in result.stderr and "Settings are written key=value" in result.stderr
