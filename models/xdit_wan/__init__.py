"""Wan 2.1 and 2.2, text to video (Wan Team 2025, arXiv:2503.20314): text by cross-attention."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from xdit_core import ModelSpec, hookimpl
from xdit_core.model_spec import Aligned, Blocks, Caching, Checkpoint, Latents, RequestSpec, Stream, TrunkSpec

TP_PLAN = MappingProxyType(
    {
        "blocks.*.attn[12].to_[qkv]": "colwise",
        "blocks.*.attn[12].norm_[qk]": "normed",
        "blocks.*.attn[12].to_out.0": "rowwise",
        "blocks.*.ffn.net.0.proj": "colwise",
        "blocks.*.ffn.net.2": "rowwise",
    }
)
CONDITIONING = (
    *("condition_embedder.text_embedder", "condition_embedder.time_*", "rope"),
    *("blocks.*.attn2.to_[kv]", "blocks.*.attn2.norm_k"),
)
DEFAULTS = MappingProxyType({"steps": 50, "guidance": 5.0, "height": 480, "width": 832, "frames": 81, "fps": 16})


def vae(configs: Mapping[str, Any], key: str, otherwise: int) -> int:
    """A number from the VAE's config."""
    return int(configs.get("vae", {}).get(key) or otherwise)


@hookimpl
def xdit_model() -> ModelSpec:
    """The adapter."""
    return ModelSpec(
        name="wan",
        checkpoint=Checkpoint(
            ("WanPipeline",), hub="Wan-AI/Wan2.1-T2V-1.3B-Diffusers", more_denoisers=("transformer_2",)
        ),
        trunk=TrunkSpec(
            blocks=(Blocks("blocks", "num_layers"),),
            stream=Stream(image_aligned=(Aligned("rotary_emb", dim=1), Aligned("temb", dim=1, dims=4))),
            attention=lambda block: ("self", "cross"),
            tp_plan=TP_PLAN,
        ),
        latents=Latents(
            frame_dim=2,
            frame_step=lambda configs: vae(configs, "scale_factor_temporal", 4),
            token_pixels=lambda configs: 2 * vae(configs, "scale_factor_spatial", 8),
        ),
        caching=Caching(conditioning=CONDITIONING),
        request=RequestSpec(
            DEFAULTS, example="a cat walks on the grass, realistic", renamed={"images": "num_videos_per_prompt"}
        ),
        unsupported={
            "encoder_hidden_states_image": "the attention to an image is not told apart from that to the text yet"
        },
    )
