"""Which rows of an attention call a tensor holds, and in which order."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from xdit_core.parallel.tokens import Span, TokenLayout, length


@dataclass(frozen=True)
class RowSet:
    """Rows of an attention call: patch after patch, and within a patch shard after shard.

    Rows are numbered as the call without any strategy would number them: in joint attention the picture's rows and the
    text's rows one behind the other.

    Args:
        layout: the tokens of the picture and the text.
        kind: ``joint`` for picture and text rows, ``self`` for picture rows only.
        patches: the patches in the order in which their rows lie; None stands for the whole picture.
        shards: the shards of each patch, in order.
    """

    layout: TokenLayout
    kind: str
    patches: tuple[int | None, ...]
    shards: tuple[int, ...]

    def but(self, **changes: Any) -> RowSet:
        """A copy with other values."""
        return replace(self, **changes)

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        """Ranges of row numbers, in the order in which the rows lie."""
        of = self.layout.joint if self.kind == "joint" else self.layout.picture
        return tuple(span for patch in self.patches for shard in self.shards for span in of(patch, shard))

    def __len__(self) -> int:
        return length(self.spans)

    def positions(self) -> torch.Tensor:
        """The row numbers, int64 ``[number of rows]`` on the CPU."""
        parts = [torch.arange(start, stop) for start, stop in self.spans]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)

    def index_in(self, held: RowSet) -> torch.Tensor:
        """Where the rows of this set lie in a tensor that has the rows of another set, int64 on the CPU.

        Args:
            held: a set that holds all rows of this one.
        """
        theirs = held.positions()
        place = torch.full((int(theirs.max()) + 1 if len(theirs) else 0,), -1)
        place[theirs] = torch.arange(len(theirs))
        return place[self.positions()]
