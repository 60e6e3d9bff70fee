"""The pytest plugin of ``xdit_core.testing``; active wherever xdit is installed.

Fixtures: ``gloo`` (a session pool of workers), ``tiny_sd3_folder`` (a checkpoint on disk), ``check_plan`` (a plan
compared with its oracle). Torch is imported when one is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
def check_plan(gloo: Pool, tiny_sd3_folder: Path) -> Callable[..., list[dict[str, int]]]:
    """Compare a plan on several ranks with its oracle: ``check_plan(plugins, settings, world=2)``; see
    ``xdit_core.testing.check_plan``. Without ``folder=`` the model is the tiny Stable Diffusion 3."""
    from xdit_core.testing import checks

    def check(
        plugins: Sequence[str],
        settings: Mapping[str, Any] | None = None,
        *,
        world: int,
        folder: str | Path = tiny_sd3_folder,
        within: float = 1e-5,
        nccl_rules: bool = False,
    ) -> list[dict[str, int]]:
        more: dict[str, Any] = {"within": within, "nccl_rules": nccl_rules}
        return checks.check_plan(gloo, folder, plugins, settings, world=world, **more)

    return check


@pytest.fixture(scope="session")
def tiny_pixart_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny PixArt-Sigma checkpoint with random weights: 4 blocks, 4 heads, 64 picture tokens, text by
    cross-attention."""
    from xdit_core.testing.models import save_tiny_pixart

    folder = tmp_path_factory.mktemp("models") / "tiny-pixart"
    return folder if folder.exists() else save_tiny_pixart(folder)
