from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.launcher.served import Served

pytest.importorskip("fastapi")


@pytest.fixture(scope="session")
def words(tiny_sd3_folder: Path) -> tuple[str, ...]:
    """What chooses a tiny checkpoint on this machine."""
    return ("model=sd3", f"model.path={tiny_sd3_folder}", "steps=3", "max_sequence_length=5", "device=cpu")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, words: tuple[str, ...]) -> Iterator[Served]:
    """A server without keys over one rank."""
    served = Served(tmp_path_factory.mktemp("serve") / "server", *words, "serve.queue=3", "serve.steps=2000").ready()
    yield served
    served.close()
    assert "Traceback" not in served.log() and not served.events("a request failed"), served.log()


@pytest.fixture
def http(server: Served) -> Iterator[Any]:
    with server.http() as client:
        yield client
