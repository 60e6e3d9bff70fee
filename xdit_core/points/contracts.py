"""Checks what wraps pass on and return: it must have the type and the shape that the model's own code has there.

Without these checks, a wrap that forgets ``return`` or returns too few rows could give a wrong picture and no error.
Each check returns what is wrong as words for a message, or "".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from xdit_core.parallel.rank import Rank
from xdit_core.parallel.tokens import length
from xdit_core.points.attention import AttentionCall
from xdit_core.points.forward import ForwardCall
from xdit_core.points.request import Output, Request
from xdit_core.points.trunk import Rows

Check = Callable[[Any, Any], str]


def contract(rank: Rank, point: str, level: str, owner: bool) -> Check:
    """Return the check for the results of wraps at a level; it is called with the argument and the result of the wrap.

    Args:
        owner: this rank makes the output of the pipeline.
    """
    if point == "trunk":
        return trunk_contract(rank, level)
    if point == "forward":
        return forward_contract(rank)
    if point == "decode":
        return decode_contract(owner)
    return attention_contract if point == "attention" else request_contract


def given_contract(point: str) -> Callable[[tuple[Any, ...]], str]:
    """Return the check for the arguments with which a wrap calls its inner."""
    wanted: type = {
        "attention": AttentionCall,
        "trunk": Rows,
        "forward": ForwardCall,
        "decode": torch.Tensor,
        "request": Request,
    }[point]

    def check(args: tuple[Any, ...]) -> str:
        if not args:
            return "nothing"
        value = args[0]
        if not isinstance(value, wanted) or (point != "decode" and len(args) > 1):
            return f"{' and '.join(map(kind, args))} where one {wanted.__name__} is expected"
        if not isinstance(value, AttentionCall):
            return ""
        q, k, v = value.q, value.k, value.v
        fits = k.shape[:-1] == v.shape[:-1] and (q.shape[0], q.shape[-1], q.dtype) == (k.shape[0], k.shape[-1], k.dtype)
        return (
            ""
            if fits and k.dtype == v.dtype
            else f"queries, keys and values that do not fit: {kind(q)}, {kind(k)} and {kind(v)}"
        )

    return check


def kind(value: Any) -> str:
    """Describe a value in words."""
    if value is None:
        return "None (is a `return` missing?)"
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    return f"a {type(value).__name__}"


def attention_contract(call: AttentionCall, out: Any) -> str:
    """Rows of the queries, width of the values; with the log-sum-exp of each row where it is asked for."""
    if call.with_lse:
        if not isinstance(out, tuple) or len(out) != 2 or not all(isinstance(x, torch.Tensor) for x in out):
            return f"{kind(out)} where (out, lse) is expected"
        out, lse = out
        if lse.shape != call.q.shape[:-1]:
            return f"a log-sum-exp of shape {tuple(lse.shape)} where {tuple(call.q.shape[:-1])} is expected"
    shape = (*call.q.shape[:-1], call.v.shape[-1])
    if not isinstance(out, torch.Tensor) or out.shape != shape or not (call.with_lse or out.dtype == call.q.dtype):
        return f"{kind(out)} where shape {tuple(shape)} and {call.q.dtype} are expected"
    return ""


def trunk_contract(rank: Rank, level: str) -> Check:
    """Rows; behind the level ``gather`` those of all shards. None only from stages whose rows go on to another one."""
    stages = rank.plan.stages
    may_be_nothing = level != "reuse" and bool(stages) and rank.index(stages) < rank.degree(stages) - 1

    def check(rows: Rows, out: Any) -> str:
        if out is None and may_be_nothing:
            return ""
        if not isinstance(out, Rows):
            return f"{kind(out)} where Rows are expected"
        context = rows.context
        whole = length(context.layout.picture(context.patch, None))
        count = whole if level == "gather" else rows.tokens.shape[1]
        shape = (rows.tokens.shape[0], count, rows.tokens.shape[2])
        if not isinstance(out.tokens, torch.Tensor) or out.tokens.shape != shape:
            return f"Rows whose tokens are {kind(out.tokens)} where shape {shape} is expected"
        if out.text is not None and (
            rows.text is None or not isinstance(out.text, torch.Tensor) or out.text.shape[0] != shape[0]
        ):
            return f"Rows whose text is {kind(out.text)}"  # None is right behind the last block that has text
        return ""

    return check


def forward_contract(rank: Rank) -> Check:
    """A prediction of the latents' shape, whatever its channels."""
    frame_dim = rank.spec.latents.frame_dim

    def check(call: ForwardCall, out: Any) -> str:
        latents = call.latents
        dims = latents.dim()
        channels = dims - 1 if dims < 4 else next(d for d in range(1, dims) if d != frame_dim)
        wanted = [n for d, n in enumerate(latents.shape) if d != channels]
        if (
            isinstance(out, torch.Tensor)
            and out.dim() == dims
            and [n for d, n in enumerate(out.shape) if d != channels] == wanted
        ):
            return ""
        shape = ", ".join("any" if d == channels else str(n) for d, n in enumerate(latents.shape))
        return f"{kind(out)} where a prediction of shape ({shape}) is expected"

    return check


def decode_contract(owner: bool) -> Check:
    """The pictures in a tuple, or None on ranks that do not make the output."""

    def check(latents: torch.Tensor, out: Any) -> str:
        if out is None and not owner:
            return ""
        try:
            pictures = out[0]
        except (TypeError, LookupError):
            return f"{kind(out)} where a tuple with the pictures is expected"
        if not isinstance(pictures, torch.Tensor) or pictures.shape[:1] != latents.shape[:1]:
            return f"{kind(pictures)} as pictures of {latents.shape[0]} latents"
        return ""

    return check


def request_contract(request: Request, outputs: Any) -> str:
    """A list of outputs."""
    if isinstance(outputs, list) and all(isinstance(output, Output) for output in outputs):
        return ""
    return f"{kind(outputs)} where a list of outputs is expected"
