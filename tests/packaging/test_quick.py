"""`pytest -m quick` runs something of every strategy and every adapter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from helpers.models.families import FAMILIES
from helpers.quick import QUICK
from xdit_core.registry.discovery import installed
from xdit_core.registry.registry import MODELS, STRATEGIES

ROOT = Path(__file__).parents[2]


def own(group):
    """Names of a group that this distribution brings."""
    return {name for name, items in installed(group).plugins.items() if items[0].distribution == "xdit"}


@pytest.fixture(scope="module")
def quick():
    """Names of the quick tests."""
    files = {name.partition("::")[0] for name in QUICK}
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "quick", *sorted(files)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if "::" in line]


@pytest.mark.slow
def test_every_line_of_the_list_names_a_test(quick):
    assert [begin for begin in QUICK if not any(name.startswith(begin) for name in quick)] == []


@pytest.mark.slow
def test_every_strategy_and_adapter_is_among_them(quick):
    strategies = {name.partition("test_")[2].partition(".py")[0] for name in quick if name.startswith("tests/plugins/")}
    assert strategies == own(STRATEGIES)
    models = {family.model for name, family in FAMILIES.items() if any(f"is_diffusers[{name}-" in q for q in quick)}
    assert models | {"emoji"} == own(MODELS) and any("tests/models/test_emoji.py" in name for name in quick)
