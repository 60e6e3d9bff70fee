"""What a rank is doing, as data: a rank writes it into its heartbeat, the launcher reads it. Without torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Phase(StrEnum):
    """The phases that the core knows; a plugin may name others."""

    STARTING = "starting"
    IMPORTING = "importing"
    CONNECTING = "connecting"
    LOADING = "loading"
    ENCODING = "encoding"
    DENOISING = "denoising"
    GATHERING = "gathering"
    DECODING = "decoding"
    WRITING = "writing"
    READY = "ready"
    DONE = "done"


@dataclass(frozen=True)
class Status:
    """What a rank is doing.

    Args:
        phase: one of `Phase`, or a word that a plugin chose.
        detail: what the phase is about: the component that is loaded, the file that is written.
        step, steps: the step of the pipeline that runs, counted from 1, and how many there are; 0 outside the steps.
        waiting_for: what it waits for, "" while it works itself.
        axis: of the mesh along which it waits, "" if that is not known.
        peers: the ranks that it waits for, none if they are not known.
    """

    phase: str
    detail: str = ""
    step: int = 0
    steps: int = 0
    waiting_for: str = ""
    axis: str = ""
    peers: tuple[int, ...] = ()

    @property
    def waiting(self) -> bool:
        """Whether it waits for other ranks."""
        return bool(self.waiting_for)

    def __str__(self) -> str:
        work = f"step {self.step} of {self.steps}" if self.step else f"{self.phase} {self.detail}".rstrip()
        return f"waiting for {self.waiting_for} ({work})" if self.waiting_for else work

    def to_dict(self) -> dict[str, Any]:
        """The fields that say something, for JSON; ``from_dict`` reads it."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items() if value}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Status:
        """Read what ``to_dict`` wrote.

        Raises:
            TypeError: ``values`` has other fields.
        """
        return Status(**{"phase": "", **values, "peers": tuple(values.get("peers", ()))})


STARTING = Status(Phase.STARTING)
