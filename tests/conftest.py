"""For all tests."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

from helpers.quick import QUICK

# torch looks up the name of whoever connects to a store; where the DNS loses an answer, that takes 5 s by default
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist, which reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the quick tests, and those that wait for processes: with ``-n 2`` one worker of pytest runs all of these,
    which share hosts and ports, and the other one all that computes."""
    launcher = Path(__file__).parent / "launcher"
    for item in items:
        if launcher in item.path.parents:
            item.add_marker(pytest.mark.xdist_group("launcher"))
        if item.nodeid.startswith(QUICK):
            item.add_marker(pytest.mark.quick)


def pytest_collection_finish() -> None:
    """Do not look through what the libraries hold whenever garbage is collected."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """One thread here as in the workers of the pool: on some processors a sum is rounded by the number of threads."""
    import torch

    torch.set_num_threads(1)
