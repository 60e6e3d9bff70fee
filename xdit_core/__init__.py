"""Parallel inference for diffusion transformers, where every parallel method and every model is a plugin.

The names here are the public ones; plugins use these and nothing else. Those that need torch are loaded when first
used, so that declaring and planning stay instant.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from xdit_core.checkpoints.model_facts import default_size, latent_factor
from xdit_core.errors import (
    GuardError,
    LazyError,
    LockstepError,
    ModelError,
    PlanRefused,
    PluginError,
    PluginFailed,
    RequestCancelled,
    UnsupportedCall,
    UsageError,
    XditError,
)
from xdit_core.hookspecs import hookimpl
from xdit_core.machine import cuda_capability
from xdit_core.model_spec import (
    Aligned,
    Blocks,
    Caching,
    Checkpoint,
    Latents,
    ModelSpec,
    RequestSpec,
    Stream,
    Text,
    TrunkSpec,
)
from xdit_core.observe.observer import Around, Awaited, Observer, Sending
from xdit_core.observe.status import Status
from xdit_core.parallel.tokens import TokenLayout, even_bounds, length
from xdit_core.plan import Plan
from xdit_core.planning.planner import make_plan
from xdit_core.records import (
    EXACT,
    Axis,
    Built,
    Claim,
    Declaration,
    Fidelity,
    ModelFacts,
    Problem,
    Stages,
    Traffic,
    Transform,
    Wrap,
    divisors,
    join_words,
)
from xdit_core.registry.registry import Registry
from xdit_core.settings import did_you_mean

if TYPE_CHECKING:
    from xdit_core.engine.engine import Engine
    from xdit_core.outputs.preview import Preview
    from xdit_core.parallel.axis_placement import AxisPlacement
    from xdit_core.parallel.channel import Channel, Message, Receive
    from xdit_core.parallel.collectives import CollectiveWatch, gather_parts
    from xdit_core.parallel.mesh import Mesh
    from xdit_core.parallel.patch_tensor import PatchTensor, materialized, patchwise
    from xdit_core.parallel.placements import LocalPlacement, PatchPlacement
    from xdit_core.parallel.rank import Rank
    from xdit_core.parallel.row_set import RowSet
    from xdit_core.parallel.slices import TensorSlice, keep_slice, slice_of
    from xdit_core.points.attention import AttentionCall, RunAttention, refuse_mask
    from xdit_core.points.branches import BranchState
    from xdit_core.points.context import ForwardContext
    from xdit_core.points.forward import ForwardCall, RunForward
    from xdit_core.points.kv_cache import KVCache
    from xdit_core.points.request import Job, Output, Request, RunRequest, joined, share
    from xdit_core.points.trunk import Absent, Rows, RunTrunk, Selector
    from xdit_core.points.unet import share_between_patches

__version__ = "0.1.0"

_WITH_TORCH = {
    "Absent": ("points.trunk", "Absent"),
    "AttentionCall": ("points.attention", "AttentionCall"),
    "RunAttention": ("points.attention", "RunAttention"),
    "AxisPlacement": ("parallel.axis_placement", "AxisPlacement"),
    "BranchState": ("points.branches", "BranchState"),
    "ForwardContext": ("points.context", "ForwardContext"),
    "KVCache": ("points.kv_cache", "KVCache"),
    "RowSet": ("parallel.row_set", "RowSet"),
    "ForwardCall": ("points.forward", "ForwardCall"),
    "Channel": ("parallel.channel", "Channel"),
    "CollectiveWatch": ("parallel.collectives", "CollectiveWatch"),
    "Engine": ("engine.engine", "Engine"),
    "RunForward": ("points.forward", "RunForward"),
    "LocalPlacement": ("parallel.placements", "LocalPlacement"),
    "Mesh": ("parallel.mesh", "Mesh"),
    "Message": ("parallel.channel", "Message"),
    "Job": ("points.request", "Job"),
    "Output": ("points.request", "Output"),
    "Request": ("points.request", "Request"),
    "Receive": ("parallel.channel", "Receive"),
    "RunRequest": ("points.request", "RunRequest"),
    "gather_parts": ("parallel.collectives", "gather_parts"),
    "joined": ("points.request", "joined"),
    "share_between_patches": ("points.unet", "share_between_patches"),
    "share": ("points.request", "share"),
    "PatchTensor": ("parallel.patch_tensor", "PatchTensor"),
    "PatchPlacement": ("parallel.placements", "PatchPlacement"),
    "Preview": ("outputs.preview", "Preview"),
    "Rank": ("parallel.rank", "Rank"),
    "Rows": ("points.trunk", "Rows"),
    "Selector": ("points.trunk", "Selector"),
    "RunTrunk": ("points.trunk", "RunTrunk"),
    "TensorSlice": ("parallel.slices", "TensorSlice"),
    "keep_slice": ("parallel.slices", "keep_slice"),
    "slice_of": ("parallel.slices", "slice_of"),
    "materialized": ("parallel.patch_tensor", "materialized"),
    "patchwise": ("parallel.patch_tensor", "patchwise"),
    "refuse_mask": ("points.attention", "refuse_mask"),
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
    "Aligned",
    "Around",
    "AttentionCall",
    "Awaited",
    "Axis",
    "AxisPlacement",
    "Blocks",
    "BranchState",
    "Built",
    "Caching",
    "Channel",
    "Checkpoint",
    "Claim",
    "CollectiveWatch",
    "Declaration",
    "Engine",
    "Fidelity",
    "ForwardCall",
    "ForwardContext",
    "GuardError",
    "Job",
    "KVCache",
    "Latents",
    "LazyError",
    "LocalPlacement",
    "LockstepError",
    "Mesh",
    "Message",
    "ModelError",
    "ModelFacts",
    "ModelSpec",
    "Observer",
    "Output",
    "PatchPlacement",
    "PatchTensor",
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
    "RequestCancelled",
    "RequestSpec",
    "RowSet",
    "Rows",
    "RunAttention",
    "RunForward",
    "RunRequest",
    "RunTrunk",
    "Selector",
    "Sending",
    "Stages",
    "Status",
    "Stream",
    "TensorSlice",
    "Text",
    "TokenLayout",
    "Traffic",
    "Transform",
    "TrunkSpec",
    "UnsupportedCall",
    "UsageError",
    "Wrap",
    "XditError",
    "cuda_capability",
    "default_size",
    "did_you_mean",
    "divisors",
    "even_bounds",
    "gather_parts",
    "hookimpl",
    "join_words",
    "joined",
    "keep_slice",
    "latent_factor",
    "length",
    "make_plan",
    "materialized",
    "patchwise",
    "refuse_mask",
    "share",
    "share_between_patches",
    "slice_of",
]
