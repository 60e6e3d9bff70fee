"""For all tests."""

from __future__ import annotations

import gc
import os
from typing import Any

import pytest

from helpers.quick import QUICK

HOSTS = "tests/launcher/hosts/"

# torch looks up the name of whoever connects to a store; where the DNS loses an answer, that takes 5 s by default
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")
# threads of a process that wait for work of their own leave the processors to other tests
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the quick tests; of several workers, one begins with what takes longest."""
    for item in items:
        if item.nodeid.startswith(QUICK):
            item.add_marker(pytest.mark.quick)
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: not item.nodeid.startswith(HOSTS))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With ``-n 2`` one worker runs all tests that make hosts, a Slurm or a Ray, of which there is never a second one
    at the same time, and the other one a file of tests after another; who is done first takes the next file."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return HOSTS if nodeid.startswith(HOSTS) else nodeid.partition("::")[0]

    config.option.loadscopereorder = False
    return ByFile(config, log)


def pytest_collection_finish() -> None:
    """Do not look through what the libraries hold whenever garbage is collected."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """One thread here as in the workers of the pool: on some processors a sum is rounded by the number of threads."""
    import torch

    torch.set_num_threads(1)
