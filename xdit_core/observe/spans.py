"""What a trace consists of: spans of time on one rank. Without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Span:
    """Something that took a while.

    Args:
        name: what.
        kind: an extension point, ``block``, ``send``, ``wait``, ``phase`` or ``step``.
        start, end: nanoseconds of this rank's clock.
        axis: of the mesh, for sends and waits.
        about: ``bytes``, ``channel``, ``peer`` and ``number`` of a message; ``ranks`` of a collective, and when it
            ``began`` if that was before the wait.
    """

    name: str
    kind: str
    start: int
    end: int
    axis: str = ""
    about: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Record:
    """What one rank saw.

    Args:
        sent: bytes that it sent, by name, as strategies count them.
        offsets: at two moments of the common clock (rank 0's, ns), how far this rank's clock is ahead of it in ns.
    """

    rank: int
    host: str
    spans: Sequence[Span]
    offsets: tuple[tuple[int, int], ...] = ()
    sent: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """What JSON can write."""
        return {**vars(self), "spans": [list(vars(span).values()) for span in self.spans]}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Record:
        """What `to_json` gave."""
        offsets = tuple((int(moment), int(ahead)) for moment, ahead in values["offsets"])
        return cls(**{**values, "spans": [Span(*span) for span in values["spans"]], "offsets": offsets})
