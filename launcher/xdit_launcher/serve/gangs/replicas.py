"""How many gangs of the same plan answer requests. Without torch."""

from __future__ import annotations

from dataclasses import dataclass

from xdit_core.errors import UsageError

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
