"""What is known about the running call of the denoiser: its step, branch, token layout and patch.

Wraps find it as ``ForwardContext``, a frozen record, in what they are called with. Modules inside the denoiser get only
the model's own arguments, so they read it from ``Running``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from xdit_core.parallel.row_set import RowSet
from xdit_core.parallel.tokens import TokenLayout
from xdit_core.points.branches import Branches, BranchState


@dataclass
class HeadCheck:
    """Result of the check of one call: whether the head got rows of NaN beside the rows of the patch."""

    given_nan: bool = False


@dataclass(frozen=True)
class ForwardContext:
    """Facts about one call of the denoiser by the pipeline, or about one patch of such a call.

    Args:
        number: counts the calls by the pipeline; the patches of a call share it. It is the same on all ranks that work
            on one picture, so it names the messages that they send each other.
        step: steps of the pipeline that are done in this job.
        branch: the condition of this call, and what is kept for it from step to step.
        layout: the picture's and the text's tokens.
        row_dim: dim of the latents along which patches are cut.
        cuts: rows of the latents at which patches begin and end, ``patches + 1`` numbers.
        pictures: pictures that this call of the pipeline makes.
        frames: latent frames.
        shard: this rank's part of every patch.
        skipped_blocks: blocks that the pipeline asked to leave out.
        patch: the patch that is computed, None for the whole picture.
        latents: which rows of the latents are true: ``all``, those of the ``patch``, or ``none`` because the rows come
            from another rank behind the embedding.
        shape_known: the shape of the prediction is known, so that the head need not run to find it.
        shape_only: only the shape of the prediction is wanted, and the blocks are left out.
        check_embedding: this call checks that the embedding works on each row alone.
        check_head: this call checks the same for the head, and the result goes here; None if it is known already.
    """

    number: int = 0
    step: int = 0
    branch: BranchState = field(default_factory=BranchState)
    layout: TokenLayout = field(default_factory=lambda: TokenLayout(1, 1))
    row_dim: int = -2
    cuts: tuple[int, ...] = (0, 1)
    pictures: int = 1
    frames: int = 1
    shard: int = 0
    skipped_blocks: frozenset[int] = frozenset()
    patch: int | None = None
    latents: Literal["all", "patch", "none"] = "all"
    shape_known: bool = False
    shape_only: bool = False
    check_embedding: bool = False
    check_head: HeadCheck | None = None

    def but(self, **changes: Any) -> ForwardContext:
        """A copy with other values."""
        return replace(self, **changes)

    @property
    def latent_rows(self) -> tuple[int, int]:
        """First row of the latents that belongs to the patch, and the first that no longer does."""
        if self.patch is None:
            return self.cuts[0], self.cuts[-1]
        return self.cuts[self.patch], self.cuts[self.patch + 1]

    def rows(self, kind: str) -> RowSet:
        """The rows that this rank computes in attention calls of a kind (``joint`` or ``self``)."""
        return RowSet.of(self.layout, kind, (self.patch,), (self.shard,))


@dataclass
class Running:
    """The call and the block that run at this moment, for modules inside the denoiser.

    The model calls these modules with its own arguments only.

    Args:
        context: of the call of the denoiser; written by the forward point.
        block: index of the block; written by the trunk.
    """

    context: ForwardContext = field(default_factory=ForwardContext)
    block: int = -1


class JobState:
    """Counters of one job, which is one call of the pipeline: branches, steps, calls of the denoisers.

    Attributes:
        pictures: that this call of the pipeline makes.
        grid: rows and columns of tokens at the size asked for.
        step: steps that are done.
        calls: of the denoisers, over all requests.
    """

    def __init__(self) -> None:
        self.branches = Branches()
        self.pictures, self.grid, self.step = 1, (1, 1), 0
        self.calls = 0

    def begin(self, pictures: int, grid: tuple[int, int]) -> None:
        """A call of the pipeline begins."""
        self.clear()
        self.pictures, self.grid, self.step = pictures, grid, 0

    def clear(self) -> None:
        """Drop what was kept for the branches of the last job."""
        self.branches.clear()

    def next_call(self) -> int:
        """The number of another call of a denoiser; numbers are not used again, so that late messages find no taker."""
        self.calls += 1
        return self.calls
