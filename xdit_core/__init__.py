"""Parallel inference for diffusion transformers, where every parallel method and every model is a plugin.

The names here are the public ones; plugins use these and nothing else. Those that need torch are loaded when first
used, so that declaring and planning stay instant.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from xdit_core.checkpoint import default_size, latent_factor
from xdit_core.errors import (
    GuardError,
    LazyError,
    LockstepError,
    ModelError,
    PlanRefused,
    PluginError,
    PluginFailed,
    UnsupportedCall,
    UsageError,
    XditError,
)
from xdit_core.hookspecs import hookimpl
from xdit_core.machine import cuda_capability
from xdit_core.plan import Plan, make_plan
from xdit_core.records import (
    EXACT,
    Axis,
    Blocks,
    Built,
    Claim,
    Declaration,
    Facts,
    Fidelity,
    ModelSpec,
    Problem,
    Stream,
    Traffic,
    Transform,
    Wrap,
    divisors,
    listed,
)
from xdit_core.registry import Registry
from xdit_core.settings import did_you_mean
from xdit_core.tokens import TokenLayout, length

if TYPE_CHECKING:
    from xdit_core.attention import Attend, positions, refuse_mask, spans_of
    from xdit_core.attention import Kernel as AttentionRun
    from xdit_core.branches import Branch
    from xdit_core.channel import Channel, Message, Receive
    from xdit_core.engine import Engine
    from xdit_core.forward import Call
    from xdit_core.forward import Run as ForwardRun
    from xdit_core.jobs import Job, Output, Request, joined, share
    from xdit_core.jobs import Run as RequestRun
    from xdit_core.lazy import LocalWorld, PatchTensor, PatchWorld, materialized, patchwise
    from xdit_core.mesh import Mesh
    from xdit_core.preview import Preview
    from xdit_core.rank import Now, Rank
    from xdit_core.trunk import Absent, Rows, Selector
    from xdit_core.trunk import Run as TrunkRun

__version__ = "0.1.0"

_WITH_TORCH = {
    "Absent": ("trunk", "Absent"),
    "Attend": ("attention", "Attend"),
    "AttentionRun": ("attention", "Kernel"),
    "Branch": ("branches", "Branch"),
    "Call": ("forward", "Call"),
    "Channel": ("channel", "Channel"),
    "Engine": ("engine", "Engine"),
    "ForwardRun": ("forward", "Run"),
    "LocalWorld": ("lazy", "LocalWorld"),
    "Mesh": ("mesh", "Mesh"),
    "Message": ("channel", "Message"),
    "Now": ("rank", "Now"),
    "Job": ("jobs", "Job"),
    "Output": ("jobs", "Output"),
    "Request": ("jobs", "Request"),
    "Receive": ("channel", "Receive"),
    "RequestRun": ("jobs", "Run"),
    "joined": ("jobs", "joined"),
    "share": ("jobs", "share"),
    "PatchTensor": ("lazy", "PatchTensor"),
    "PatchWorld": ("lazy", "PatchWorld"),
    "Preview": ("preview", "Preview"),
    "Rank": ("rank", "Rank"),
    "Rows": ("trunk", "Rows"),
    "Selector": ("trunk", "Selector"),
    "TrunkRun": ("trunk", "Run"),
    "materialized": ("lazy", "materialized"),
    "patchwise": ("lazy", "patchwise"),
    "positions": ("attention", "positions"),
    "refuse_mask": ("attention", "refuse_mask"),
    "spans_of": ("attention", "spans_of"),
}


def __getattr__(name: str) -> Any:
    """Import the names that need torch when they are first used."""
    if name in _WITH_TORCH:
        module, attribute = _WITH_TORCH[name]
        return getattr(importlib.import_module(f"xdit_core.{module}"), attribute)
    raise AttributeError(f"module 'xdit_core' has no attribute {name!r}")


__all__ = [
    "EXACT",
    "Absent",
    "Attend",
    "AttentionRun",
    "Axis",
    "Blocks",
    "Branch",
    "Built",
    "Call",
    "Channel",
    "Claim",
    "Declaration",
    "Engine",
    "Facts",
    "Fidelity",
    "ForwardRun",
    "GuardError",
    "Job",
    "LazyError",
    "LocalWorld",
    "LockstepError",
    "Mesh",
    "Message",
    "ModelError",
    "ModelSpec",
    "Now",
    "Output",
    "PatchTensor",
    "PatchWorld",
    "Plan",
    "PlanRefused",
    "PluginError",
    "PluginFailed",
    "Preview",
    "Problem",
    "Rank",
    "Receive",
    "Registry",
    "Request",
    "RequestRun",
    "Rows",
    "Selector",
    "Stream",
    "TokenLayout",
    "Traffic",
    "Transform",
    "TrunkRun",
    "UnsupportedCall",
    "UsageError",
    "Wrap",
    "XditError",
    "cuda_capability",
    "default_size",
    "did_you_mean",
    "divisors",
    "hookimpl",
    "joined",
    "latent_factor",
    "length",
    "listed",
    "make_plan",
    "materialized",
    "patchwise",
    "positions",
    "refuse_mask",
    "share",
    "spans_of",
]
