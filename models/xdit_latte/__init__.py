"""Latte (Ma et al. 2024, arXiv:2401.03048): blocks over space and blocks over time in turn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from xdit_core import ModelSpec, Problem, hookimpl
from xdit_core.model_spec import Blocks, Caching, Checkpoint, Latents, RequestSpec, Stream, TrunkSpec

TP_PLAN = MappingProxyType(
    {
        "*transformer_blocks.*.attn[12].to_[qkv]": "colwise",
        "*transformer_blocks.*.attn[12].to_out.0": "rowwise",
        "*transformer_blocks.*.ff.net.0.proj": "colwise",
        "*transformer_blocks.*.ff.net.2": "rowwise",
    }
)


def make(denoiser: Any, index: int, spatial: Any, temporal: Any) -> Any:
    """Both blocks as one."""
    from xdit_latte.pair import Pair

    return Pair(spatial, temporal, denoiser.temp_pos_embed if index == 0 else None)


def length(configs: Mapping[str, Any], asked: Mapping[str, Any]) -> Iterator[Problem]:
    """The table of positions in time has one length."""
    frames = configs["transformer"].get("video_length", 16)
    if asked["frames"] not in (1, frames):
        yield Problem(
            f"frames={asked['frames']}: this Latte makes videos of {frames} frames, or pictures", f"give {frames} or 1"
        )


@hookimpl
def xdit_model() -> ModelSpec:
    """The adapter."""
    return ModelSpec(
        name="latte",
        checkpoint=Checkpoint(("LattePipeline",), hub="maxin-cn/Latte-1"),
        trunk=TrunkSpec(
            blocks=(Blocks("transformer_blocks", "num_layers", beside=("temporal_transformer_blocks",), make=make),),
            stream=Stream(frames="frames"),
            attention=lambda pair: ("self", "cross", "cross"),
            forced_args={"enable_temporal_attentions": False},
            tp_plan=TP_PLAN,
        ),
        latents=Latents(frame_dim=2, frame_step=lambda configs: 1),
        caching=Caching(conditioning=("caption_projection", "adaln_single", "transformer_blocks.*.attn2.to_[kv]")),
        request=RequestSpec(
            {"steps": 50, "guidance": 7.5, "frames": 16, "fps": 8},
            example="a dog in a park",
            renamed={"frames": "video_length"},
            not_taken=("max_sequence_length", "images"),  # a call for several videos masks the text in another way
            check=length,
        ),
    )
