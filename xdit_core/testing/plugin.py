"""The pytest plugin of ``xdit_core.testing``; active wherever xdit is installed.

Fixtures: ``gloo`` (a session pool of workers), ``tiny_sd3_folder`` (a checkpoint on disk). Torch is imported when one
is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from xdit_core.testing.pool import Pool


@pytest.fixture(scope="session")
def gloo() -> Iterator[Pool]:
    """Workers that run a function as the ranks of a gloo group: ``gloo.run(function, *arguments, world=2)``."""
    from xdit_core.testing.pool import Pool

    pool = Pool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def tiny_sd3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion 3 checkpoint with random weights: 4 blocks, 4 heads, 64 picture tokens, 32x32 pixels."""
    from xdit_core.testing.models import save_tiny_sd3

    folder = tmp_path_factory.mktemp("models") / "tiny-sd3"
    return folder if folder.exists() else save_tiny_sd3(folder)


@pytest.fixture(scope="session")
def tiny_pixart_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny PixArt-Sigma checkpoint with random weights: 4 blocks, 4 heads, 64 picture tokens, text by
    cross-attention."""
    from xdit_core.testing.models import save_tiny_pixart

    folder = tmp_path_factory.mktemp("models") / "tiny-pixart"
    return folder if folder.exists() else save_tiny_pixart(folder)
