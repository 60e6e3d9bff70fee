"""For all tests."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """One thread here as in the workers of the pool: on some processors a sum is rounded by the number of threads."""
    import torch

    torch.set_num_threads(1)
