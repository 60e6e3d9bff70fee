"""The attention point: every self- or joint attention of a block goes through the resolved chain, or the run stops.

While the blocks run, ``F.scaled_dot_product_attention`` leads here: after QK-norm and rotary embedding, whatever the
model's processor does before. No processor is replaced.

Shapes: ``[B, H, S, D]`` - batch, heads, rows of the sequence, head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from xdit_core.errors import GuardError, UnsupportedCall
from xdit_core.parallel.row_set import RowSet
from xdit_core.points.blocks.routing import unrouted
from xdit_core.points.compose import compose
from xdit_core.points.context import ForwardContext, Running

RunAttention = Callable[["AttentionCall"], Any]


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """One attention call on its way through the wraps.

    Args:
        q, k, v: queries, keys and values ``[B, H, S, D]``.
        queries: which rows ``q`` has.
        keys: which rows ``k`` and ``v`` have.
        block, ordinal: index of the block, and which of its attention calls this is.
        options: further arguments of ``scaled_dot_product_attention``.
        context: of the call of the denoiser.
        with_lse: the caller needs ``(out, log-sum-exp [B, H, S])`` instead of ``out``.
        mask: which keys may be attended to, ``[B or 1, 1, 1, rows of the whole call]``; None for all.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    queries: RowSet
    keys: RowSet
    block: int
    ordinal: int
    options: dict[str, Any]
    context: ForwardContext
    with_lse: bool = False
    mask: torch.Tensor | None = None

    @property
    def kind(self) -> str:
        """``joint`` (picture and text rows) or ``self`` (picture rows only)."""
        return self.queries.kind

    def but(self, **changes: Any) -> AttentionCall:
        """A copy with other values."""
        return replace(self, **changes)


def refuse_mask(call: AttentionCall, who: str) -> None:
    """Refuse an attention call with a mask that differs between queries, since such a mask cannot be divided.

    Raises:
        UnsupportedCall: the call has such a mask or is causal.
    """
    if call.options.get("attn_mask") is not None or call.options.get("is_causal"):
        raise UnsupportedCall(
            f"{who} cannot divide a masked self-attention (block {call.block}); run this model without {who}."
        )


def sdpa(call: AttentionCall) -> Any:
    """The innermost kernel: torch's own choice, with the log-sum-exp where it is asked for."""
    if not call.with_lse:
        return unrouted(call.q, call.k, call.v, **call.options)
    scale, mask = call.options.get("scale"), call.options.get("attn_mask")
    if call.q.device.type == "cpu":
        cpu_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = cpu_flash(call.q, call.k, call.v, 0.0, False, attn_mask=mask, scale=scale)
    elif mask is None and call.q.dtype in (torch.float16, torch.bfloat16):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(call.q, call.k, call.v, 0.0, False, scale=scale)[
            :2
        ]
    else:
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        bias = None if mask is None else mask.expand(-1, call.q.shape[1], -1, -1)
        out, lse = efficient(call.q, call.k, call.v, bias, True, scale=scale)[:2]
    return out, lse[:, :, : call.q.shape[2]]  # some kernels pad it


class AttentionPoint:
    """Counts and redirects the attention calls of the blocks.

    Args:
        running: told which block runs.
        chain: wraps ``f(inner, call) -> out``, outermost first.
        kernels: those of them that compute.
    """

    def __init__(
        self,
        running: Running,
        chain: Sequence[Callable[[RunAttention, AttentionCall], Any]],
        kernels: Sequence[Callable[[RunAttention, AttentionCall], Any]] = (),
    ) -> None:
        self._running, self._context = running, running.context
        self._rows: dict[str, RowSet] = {}
        wraps = [*chain, self.select_mask, *kernels]
        self.run: RunAttention = compose(wraps, sdpa, checked=False)
        self._run_checked: RunAttention = compose(wraps, sdpa)
        self._sizes: dict[tuple[Any, ...], set[tuple[int, int]]] = {}
        self._checked: set[tuple[int, int]] = set()
        self.active = bool(chain or kernels)
        self.pattern: tuple[str, ...] = ()
        self.calls = 0

    def enter_blocks(self, context: ForwardContext, *size: Any) -> None:
        """The blocks run on rows of some size; each of their calls is checked the first time that it has this size."""
        self._context, self._rows = context, {kind: context.rows(kind) for kind in ("joint", "self")}
        self._checked = self._sizes.setdefault((*size, context.patch), set())

    def enter_block(self, index: int, pattern: tuple[str, ...]) -> None:
        """Expect the attention calls of one block."""
        self._running.block, self.pattern, self.calls = index, pattern, 0

    def leave_block(self) -> None:
        """Check that all of them came.

        Raises:
            GuardError: some did not go through the engine.
        """
        if self.calls != len(self.pattern):
            raise GuardError(
                f"block {self._running.block} made {self.calls} attention calls through the engine where the adapter "
                f"declares {len(self.pattern)}; the result would be wrong, so the run stops. Correct `attention` in "
                "the adapter, or use an attention processor that calls "
                "torch.nn.functional.scaled_dot_product_attention."
            )

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        """One call of the block that runs."""
        ordinal = self.calls
        self.calls += 1
        if ordinal >= len(self.pattern):
            self.leave_block()
        kind = self.pattern[ordinal]
        if kind == "cross":  # keys and values come from the text, which every rank has
            return unrouted(q, k, v, **options)
        mask, layout = options.get("attn_mask"), self._context.layout
        everything = layout.tokens + (layout.text if kind == "joint" else 0)
        if mask is not None and mask.dim() == 4 and tuple(mask.shape[1:]) == (1, 1, everything):
            options = {**options, "attn_mask": None}
        else:
            mask = None
        rows = self._rows[kind]
        call = AttentionCall(q, k, v, rows, rows, self._running.block, ordinal, options, self._context, mask=mask)
        use = (call.block, ordinal)
        if use in self._checked:
            out: torch.Tensor = self.run(call)
        else:
            out = self._run_checked(call)
            self._checked.add(use)
        return out

    def select_mask(self, inner: RunAttention, call: AttentionCall) -> Any:
        """Give the kernel the mask of the keys that are there."""
        if call.mask is None:
            return inner(call)
        mask = call.mask.index_select(-1, call.keys.positions(call.mask.device))
        if call.with_lse:  # every key of a part may be masked: its log-sum-exp must stay a number
            bias = torch.zeros(mask.shape, dtype=call.q.dtype, device=call.q.device)
            mask = bias.masked_fill(~mask, torch.finfo(bias.dtype).min / 2) if mask.dtype == torch.bool else mask
            mask = mask.expand(call.q.shape[0], 1, call.q.shape[2], mask.shape[-1])
        return inner(call.but(options={**call.options, "attn_mask": mask}, mask=None))
