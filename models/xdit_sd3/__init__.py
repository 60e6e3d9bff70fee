"""Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv:2403.03206)."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from xdit_core import ModelSpec, hookimpl
from xdit_core.model_spec import Blocks, Caching, Checkpoint, RequestSpec, Stream, Text, TrunkSpec

TP_PLAN = MappingProxyType(
    {
        "transformer_blocks.*.attn*.to_[qkv]": "colwise",
        "transformer_blocks.*.attn*.add_[qkv]_proj": "colwise",
        "transformer_blocks.*.attn*.to_out.0": "rowwise",
        "transformer_blocks.*.attn.to_add_out": "rowwise",
        "transformer_blocks.*.ff*.net.0.proj": "colwise",
        "transformer_blocks.*.ff*.net.2": "rowwise",
        "transformer_blocks.*.norm1*.linear": "gathered",
    }
)


def attention(block: Any) -> tuple[str, ...]:
    """Joint attention; the first blocks of SD3.5 medium have a second one over the image alone."""
    return ("joint", "self") if block.use_dual_attention else ("joint",)


def text_tokens(configs: Mapping[str, Any], asked: Mapping[str, Any]) -> int:
    """77 of the CLIP encoders and those of the T5, which diffusers fills with zeros if it is absent."""
    clip = configs.get("text_encoder", {}).get("max_position_embeddings", 77)
    t5 = asked.get("max_sequence_length")
    return int(clip) + (256 if t5 is None else int(t5))


@hookimpl
def xdit_model() -> ModelSpec:
    """The adapter."""
    return ModelSpec(
        name="sd3",
        checkpoint=Checkpoint(
            pipelines=("StableDiffusion3Pipeline",),
            more_pipelines=("StableDiffusion3Img2ImgPipeline",),
            hub="stabilityai/stable-diffusion-3-medium-diffusers",
        ),
        trunk=TrunkSpec(
            blocks=(Blocks("transformer_blocks", "num_layers"),),
            stream=Stream(text="encoder_hidden_states", returns=("text", "tokens")),
            attention=attention,
            skip_layers="skip_layers",
            tp_plan=TP_PLAN,
        ),
        text=Text(tokens=text_tokens),
        caching=Caching(("pos_embed",), ("context_embedder", "time_text_embed", "transformer_blocks.*.norm1*.linear")),
        request=RequestSpec({"steps": 28, "guidance": 7.0}, example="a red fox in the snow, morning light"),
        unsupported={"block_controlnet_hidden_states": "ControlNet residuals are not divided over ranks yet"},
    )
