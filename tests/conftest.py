"""For all tests."""

from __future__ import annotations

import gc
import os
from typing import Any

import pytest

from helpers.quick import QUICK

LAUNCHER = "tests/launcher/"

# torch looks up the name of whoever connects to a store; where the DNS loses an answer, that takes 5 s by default
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the quick tests."""
    for item in items:
        if item.nodeid.startswith(QUICK):
            item.add_marker(pytest.mark.quick)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With ``-n 2`` one worker runs all tests that start processes and wait for them, which share hosts and ports, and
    the other one those that compute."""
    from xdist.scheduler import LoadScopeScheduling

    class ByWaiting(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return LAUNCHER if nodeid.startswith(LAUNCHER) else nodeid

    return ByWaiting(config, log)


def pytest_collection_finish() -> None:
    """Do not look through what the libraries hold whenever garbage is collected."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """One thread here as in the workers of the pool: on some processors a sum is rounded by the number of threads."""
    import torch

    torch.set_num_threads(1)
