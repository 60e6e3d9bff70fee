from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.launcher.served import Served
from helpers.models.lora import loras_of

pytest.importorskip("fastapi")

from helpers.launcher.fake_gangs import Setting
from xdit_launcher.serve.gangs import runner


@pytest.fixture(scope="session")
def words(tiny_sd3_folder: Path) -> tuple[str, ...]:
    """What chooses a tiny checkpoint on this machine."""
    return ("model=sd3", f"model.path={tiny_sd3_folder}", "steps=3", "max_sequence_length=5", "device=cpu")


def write_list(file: Path, paths: list[str], *more: str) -> None:
    """A file for ``--loras`` with ink and wash."""
    lines = [f"{name} = {path}" for name, path in zip(("ink", "wash"), paths, strict=False)]
    file.write_text("\n".join(["# styles", *lines, "", *more]))


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, words: tuple[str, ...]) -> Iterator[Served]:
    """A server without keys over one rank, with two LoRAs."""
    folder = tmp_path_factory.mktemp("serve")
    write_list(folder / "loras.txt", loras_of(words[1].partition("=")[2], folder))
    more = ("serve.queue=3", "serve.steps=2000", "--loras", str(folder / "loras.txt"))
    served = Served(folder / "server", *words, *more).ready()
    yield served
    served.close()
    assert "Traceback" not in served.log() and not served.events("a request failed"), served.log()


@pytest.fixture
def http(server: Served) -> Iterator[Any]:
    with server.http() as client:
        yield client


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Setting]]:
    """Makes dispatchers over gangs that draw nothing."""
    monkeypatch.setattr(runner, "FIRST_PAUSE", 0.01)
    made = []

    def make(replicas: str = "1", **limits: Any) -> Setting:
        made.append(Setting(tmp_path / "data", replicas, **limits))
        return made[-1]

    yield make
    for each in made:
        each.close()
