"""The attention kernels that ``flash.kernel`` chooses among, each as a wrap.

A ring needs the log-sum-exp of each row to merge partial results, so every kernel can return it.

Shapes: q, k, v and out ``[B, H, S, D]``, lse ``[B, H, Sq]`` in float32, natural logarithm.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from xdit_core import AttentionCall, RunAttention, UnsupportedCall

KernelWrap = Callable[[RunAttention, AttentionCall], Any]
aten = torch.ops.aten


def kernel_named(name: str) -> KernelWrap:
    """The wrap of a kernel; ``auto`` leaves the choice to torch."""
    kernels: dict[str, KernelWrap] = {
        "auto": lambda inner, call: inner(call),
        "flash": partial(torch_kernel, SDPBackend.FLASH_ATTENTION, flash_lse),
        "efficient": partial(torch_kernel, SDPBackend.EFFICIENT_ATTENTION, efficient_lse),
        "cudnn": partial(torch_kernel, SDPBackend.CUDNN_ATTENTION, cudnn_lse),
        "math": partial(torch_kernel, SDPBackend.MATH, math_lse),
        "flash_attn": partial(package_kernel, "flash_attn"),
        "flash_attn_3": partial(package_kernel, "flash_attn_interface"),
    }
    return kernels[name]


def torch_kernel(
    backend: SDPBackend, with_lse: Callable[[AttentionCall], Any], inner: RunAttention, call: AttentionCall
) -> Any:
    """One of torch's backends, and no other.

    Raises:
        UnsupportedCall: the backend refuses this call (a mask, a head dim, a precision).
    """
    if call.with_lse and call.options.get("attn_mask") is not None and backend is not SDPBackend.MATH:
        raise UnsupportedCall(
            f"torch's {backend.name.lower()} kernel takes no mask in parts, which block {call.block} has; use "
            "flash.kernel=auto."
        )
    try:
        if call.with_lse:
            out, lse = with_lse(call)
            return out, lse[:, :, : call.q.shape[2]].float()  # some kernels pad it
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(call.q, call.k, call.v, **call.options)
    except RuntimeError as error:
        if "No available kernel" not in str(error) and "No viable backend" not in str(error):
            raise
        raise UnsupportedCall(
            f"torch's {backend.name.lower()} kernel refuses the attention of block {call.block} with q of shape "
            f"{tuple(call.q.shape)} and {call.q.dtype}; use flash.kernel=auto."
        ) from error


def flash_lse(call: AttentionCall) -> Any:
    """FlashAttention 2 as torch has it, or its kernel for the CPU."""
    if call.q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(call.q, call.k, call.v, scale=call.options.get("scale"))
    return aten._scaled_dot_product_flash_attention(call.q, call.k, call.v, scale=call.options.get("scale"))[:2]


def efficient_lse(call: AttentionCall) -> Any:
    """The memory-efficient kernel of xformers."""
    return aten._scaled_dot_product_efficient_attention(
        call.q, call.k, call.v, None, True, scale=call.options.get("scale")
    )[:2]


def cudnn_lse(call: AttentionCall) -> Any:
    """The kernel of cuDNN; it gives the log-sum-exp with a dim more."""
    out, lse = aten._scaled_dot_product_cudnn_attention(
        call.q, call.k, call.v, None, True, scale=call.options.get("scale")
    )[:2]
    return out, lse.reshape(*lse.shape[:2], -1)


def math_lse(call: AttentionCall) -> Any:
    """Written out: scores, log-sum-exp, weights; in float32."""
    scale = call.options.get("scale") or 1 / math.sqrt(call.q.shape[-1])
    scores = (call.q.float() @ call.k.float().transpose(-1, -2)) * scale
    if call.options.get("attn_mask") is not None:
        scores = scores + call.options["attn_mask"]
    lse = scores.logsumexp(-1)
    return ((scores - lse[..., None]).exp() @ call.v.float()).to(call.q.dtype), lse


def package_kernel(package: str, inner: RunAttention, call: AttentionCall) -> Any:
    """``flash_attn_func`` of version 2 or 3; rows before heads.

    Raises:
        UnsupportedCall: the call has a mask.
    """
    import importlib

    if call.options.get("attn_mask") is not None or call.options.get("is_causal"):
        raise UnsupportedCall(f"{package} takes no mask, which block {call.block} has; use flash.kernel=auto.")
    function = importlib.import_module(package).flash_attn_func
    q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
    more = {"return_attn_probs": True} if call.with_lse else {}
    result = function(q, k, v, softmax_scale=call.options.get("scale"), **more)
    if call.with_lse:
        return result[0].transpose(1, 2), result[1][:, :, : call.q.shape[2]].float()
    return (result[0] if isinstance(result, tuple) else result).transpose(1, 2)
