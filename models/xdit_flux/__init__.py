"""Flux.1 (Black Forest Labs 2024): double blocks over picture and text, then single blocks; latents are packed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xdit_core import ModelSpec, hookimpl, latent_factor
from xdit_core.model_spec import Aligned, Blocks, Caching, Checkpoint, Latents, RequestSpec, Stream, Text, TrunkSpec

BLOCKS = (Blocks("transformer_blocks", "num_layers"), Blocks("single_transformer_blocks", "num_single_layers"))
CONDITIONING = (
    *("context_embedder", "time_text_embed", "pos_embed"),
    *("transformer_blocks.*.norm1*.linear", "single_transformer_blocks.*.norm.linear"),
)
CONTROLNET = "ControlNet residuals are not divided over ranks yet"


def uses_cfg(asked: Mapping[str, Any]) -> bool:
    """``guidance`` is an input of the distilled model; ``call.true_cfg_scale`` with ``negative`` is guidance."""
    return (asked.get("true_cfg_scale") or 1.0) > 1.0 and asked.get("negative") is not None


@hookimpl
def xdit_model() -> ModelSpec:
    """The adapter."""
    return ModelSpec(
        name="flux",
        checkpoint=Checkpoint(("FluxPipeline",), hub="black-forest-labs/FLUX.1-dev"),
        trunk=TrunkSpec(
            blocks=BLOCKS,
            stream=Stream(
                text="encoder_hidden_states",
                joint_aligned=(Aligned("image_rotary_emb"),),
                returns=("text", "tokens"),
                text_first=True,
            ),
            attention=lambda block: ("joint",),
            tp_plan={
                "*transformer_blocks.*.attn.to_[qkv]": "colwise",
                "transformer_blocks.*.attn.add_[qkv]_proj": "colwise",
                "transformer_blocks.*.attn.to_out.0": "rowwise",
                "transformer_blocks.*.attn.to_add_out": "rowwise",
                "transformer_blocks.*.ff*.net.0.proj": "colwise",
                "transformer_blocks.*.ff*.net.2": "rowwise",
                "transformer_blocks.*.norm1*.linear": "gathered",
                "single_transformer_blocks.*.norm.linear": "gathered",
                "single_transformer_blocks.*.proj_mlp": "colwise",
                "single_transformer_blocks.*.proj_out": "rowwise",
            },
        ),
        latents=Latents(token_pixels=lambda configs: 2 * latent_factor(configs)),
        text=Text(tokens=lambda configs, asked: int(asked.get("max_sequence_length") or 512)),
        unbatched_args=("img_ids", "txt_ids"),
        caching=Caching(("x_embedder",), CONDITIONING),
        request=RequestSpec(
            {"steps": 28, "guidance": 3.5}, "a cat that holds a sign that says hello world", uses_cfg=uses_cfg
        ),
        unsupported=dict.fromkeys(("controlnet_block_samples", "controlnet_single_block_samples"), CONTROLNET),
    )
