"""Leads the blocks' calls of ``F.scaled_dot_product_attention`` to the attention point.

While blocks run, the function in ``torch.nn.functional`` is another one. Nothing else is intercepted: a function mode
would cost 5 us for each of the hundred operations of a block. In compiled code the same function becomes one opaque op.
"""

from __future__ import annotations

import math
import threading
from contextvars import ContextVar
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


class Attends(Protocol):
    """What calls are led to."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        """One call; shapes ``[B, H, S, D]``, ``options`` are the further arguments."""
        ...


# Where the calls of this thread go; compiled code can hold no reference to the engine.
_point: ContextVar[Attends | None] = ContextVar("xdit_attention_point", default=None)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    """One call to the point of this thread; what kernels call on its way goes to torch."""
    point = _point.get()
    if point is None:
        return unrouted(q, k, v, **options)
    token = _point.set(None)
    try:
        return point.attend(q, k, v, options)
    finally:
        _point.reset(token)


# its collectives cannot be captured: CUDA graphs end before it and begin anew behind it
@torch.library.custom_op("xdit::attention", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def attention_op(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """The attention chain as one op, opaque to the compiler: it keeps ``fullgraph=True`` whole."""
    options = {
        "attn_mask": attn_mask,
        "dropout_p": dropout_p,
        "is_causal": is_causal,
        "scale": scale,
        "enable_gqa": enable_gqa,
    }
    out = attend(query, key, value, options)
    return out.transpose(1, 2).contiguous().transpose(1, 2)  # as kernels lay it out: no copy


@attention_op.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *options: Any, **named: Any) -> torch.Tensor:
    batch, heads, rows, _ = query.shape
    return query.new_empty(batch, rows, heads, value.shape[-1]).transpose(1, 2)


def reshape_nothing(x: torch.Tensor, *shape: Any) -> torch.Tensor:
    """``x.reshape(*shape)`` of a tensor without rows (text that belongs to another patch), where torch finds ``-1``
    ambiguous."""
    sizes = list(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else list(shape)
    if -1 in sizes:
        known = math.prod(n for n in sizes if n > 0)
        sizes[sizes.index(-1)] = math.prod(n for n in x.shape if n) // known if 0 in sizes else 0
    return torch.Tensor.reshape(x, sizes)


def routed(query: Any, key: Any, value: Any, *rest: Any, **options: Any) -> torch.Tensor:
    """What the blocks find as ``scaled_dot_product_attention``; keyword arguments that we do not know pass through."""
    if torch.compiler.is_compiling():
        compiled: torch.Tensor = attention_op(query, key, value, *rest, **options)
        return compiled
    if rest:
        options.update(zip(("attn_mask", "dropout_p", "is_causal"), rest, strict=False))
    return attend(query, key, value, options)


class _Replaced:
    """The function of torch, and how many threads have it replaced at this moment."""

    def __init__(self) -> None:
        self.original: Any = F.scaled_dot_product_attention
        self._lock, self._users = threading.Lock(), 0

    def begin(self) -> None:
        with self._lock:
            if not self._users:  # another library may have put its own there
                self.original, F.scaled_dot_product_attention = F.scaled_dot_product_attention, routed
            self._users += 1

    def end(self) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                F.scaled_dot_product_attention = self.original


_replaced = _Replaced()


def unrouted(*args: Any, **kwargs: Any) -> torch.Tensor:
    """The function as it is when no blocks run."""
    out: torch.Tensor = _replaced.original(*args, **kwargs)
    return out


class Routing:
    """A context in which this thread's calls of ``F.scaled_dot_product_attention`` go to a point."""

    def __init__(self, point: Attends) -> None:
        self._point, self._token = point, None  # type: tuple[Attends, Any]

    def __enter__(self) -> None:
        self._token = _point.set(self._point)
        _replaced.begin()

    def __exit__(self, *details: Any) -> None:
        _replaced.end()
        _point.reset(self._token)


class EmptyRows(TorchFunctionMode):
    """A context in which ``-1`` in ``reshape`` is understood for tensors without rows.

    Attributes:
        met: such a call came.
    """

    met = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.reshape and not args[0].numel():
            self.met = True
            return reshape_nothing(*args)
        if func is torch.Tensor.unflatten and torch.compiler.is_compiling():
            return torch.ops.aten.unflatten.int(*args, **(kwargs or {}))  # it calls super(), which cannot be compiled
        return func(*args, **(kwargs or {}))
