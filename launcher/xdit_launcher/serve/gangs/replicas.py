"""How many gangs of the same plan answer requests, and where they come from. Without torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from xdit_core.errors import UsageError
from xdit_launcher.serve.events import AnyGang

MOST = 10_000


@dataclass(frozen=True)
class Replicas:
    """From ``least`` gangs, which always run, to ``most``, the further of which run while jobs wait."""

    least: int = 1
    most: int = 1

    @staticmethod
    def parse(text: str) -> Replicas:
        """``4`` or ``1..4``.

        Raises:
            UsageError: it is something else.
        """
        first, dots, last = text.partition("..")
        numbers = [int(part) for part in (first, last if dots else first) if part.isdecimal() and len(part) < 6]
        if len(numbers) < 2 or not 1 <= numbers[0] <= numbers[1] <= MOST:
            raise UsageError(
                f"--replicas {text} is not a number of gangs; write 2, or 1..4 for as many as the queue needs."
            )
        return Replicas(*numbers)


class Gangs(Protocol):
    """Where the gangs of a server come from."""

    @property
    def replicas(self) -> Replicas:
        """How many of them the dispatcher starts."""

    def start(self, number: int, unwanted: Callable[[], bool]) -> AnyGang:
        """Start the gang of a number, which counts from 0.

        Args:
            unwanted: whether it is not needed any more; asked while it loads.

        Raises:
            XditError: it could not be started, or was ended while it loaded.
        """

    def running(self) -> int | None:
        """How many there are, None if that is known from what `start` gave."""

    def renew(self) -> bool:
        """Put fresh gangs in the place of all that run, one after the other.

        Returns:
            False if whoever owns what `start` gave must do it.
        """
