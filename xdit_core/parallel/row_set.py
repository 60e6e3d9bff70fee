"""Which rows of an attention call a tensor holds, and in which order."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from xdit_core.parallel.tokens import Span, TokenLayout, length

CPU = torch.device("cpu")


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

    @classmethod
    def of(cls, layout: TokenLayout, kind: str, patches: tuple[int | None, ...], shards: tuple[int, ...]) -> RowSet:
        """Such a set; the same object if the layout was asked before, so that what it works out stays known."""
        key = (kind, patches, shards)
        found: RowSet | None = layout.row_sets.get(key)
        if found is None:
            found = layout.row_sets[key] = cls(layout, kind, patches, shards)
        return found

    def but(self, *, patches: tuple[int | None, ...] | None = None, shards: tuple[int, ...] | None = None) -> RowSet:
        """The set with other patches or shards."""
        return RowSet.of(
            self.layout,
            self.kind,
            self.patches if patches is None else patches,
            self.shards if shards is None else shards,
        )

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        """Ranges of row numbers, in the order in which the rows lie."""
        of = self.layout.joint if self.kind == "joint" else self.layout.picture
        return tuple(span for patch in self.patches for shard in self.shards for span in of(patch, shard))

    @cached_property
    def _count(self) -> int:
        return length(self.spans)

    def __len__(self) -> int:
        return self._count

    @cached_property
    def by_shard(self) -> tuple[int, ...]:
        """The number of rows of each shard; they lie shard after shard only in a set of one patch."""
        return tuple(len(self.but(shards=(shard,))) for shard in self.shards)

    @cached_property
    def _positions(self) -> dict[torch.device, torch.Tensor]:
        return {}

    def positions(self, device: torch.device = CPU) -> torch.Tensor:
        """The row numbers, int64 ``[number of rows]``; made once for a device, so not to be written to."""
        if device not in self._positions:
            parts = [torch.arange(start, stop) for start, stop in self.spans]
            known = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
            self._positions[device] = known.to(device)
        return self._positions[device]

    def index_in(self, held: RowSet) -> torch.Tensor:
        """Where the rows of this set lie in a tensor that has the rows of another set, int64 on the CPU.

        Args:
            held: a set that holds all rows of this one.
        """
        theirs = held.positions()
        place = torch.full((int(theirs.max()) + 1 if len(theirs) else 0,), -1)
        place[theirs] = torch.arange(len(theirs))
        return place[self.positions()]
