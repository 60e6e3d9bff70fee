"""The attention of PipeFusion: a patch attends to the newest keys and values of every patch.

Shapes: queries, keys and values ``[B, H, S, D]`` - batch, heads, rows, head width.
"""

from __future__ import annotations

from typing import Any

from xdit_core import AttentionCall, KVCache, RunAttention, refuse_mask


class DisplacedAttention:
    """Attends to keys and values of this step for patches that are done, and of the step before for the others.

    Args:
        warmup: synchronous steps at the start.
    """

    def __init__(self, warmup: int) -> None:
        self.warmup = warmup

    def __call__(self, inner: RunAttention, call: AttentionCall) -> Any:
        """One attention call.

        Args:
            call: with the rows of one patch, or of the whole picture in warm-up; text rows belong to patch 0.
        """
        context = call.context
        if context.layout.patches == 1:
            return inner(call)
        refuse_mask(call, "pipefusion")
        if context.patch is None and context.branch.steps_done < self.warmup - 1:
            return inner(call)  # only the last synchronous step is attended to later
        cache = context.branch.keep((self, call.block, call.ordinal), lambda: KVCache(call))
        cache.write(call)
        return inner(call if context.patch is None else cache.attend(call))
