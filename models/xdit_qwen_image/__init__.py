"""Qwen-Image (Wu et al. 2025, arXiv:2508.02324): picture and text in joint attention, packed latents, true guidance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xdit_core import ModelSpec, hookimpl
from xdit_core.model_spec import Aligned, Blocks, Caching, Checkpoint, Latents, RequestSpec, Stream, Text, TrunkSpec

CONDITIONING = (
    *("txt_norm", "time_text_embed", "txt_in", "pos_embed"),
    *("transformer_blocks.*.img_mod", "transformer_blocks.*.txt_mod"),
)


def token_pixels(configs: Mapping[str, Any]) -> int:
    """Two latent elements a side."""
    halvings: list[bool] = configs.get("vae", {}).get("temperal_downsample") or [False, True, True]
    return int(2 * 2 ** len(halvings))


@hookimpl
def xdit_model() -> ModelSpec:
    """The adapter."""
    return ModelSpec(
        name="qwen_image",
        checkpoint=Checkpoint(("QwenImagePipeline",), hub="Qwen/Qwen-Image"),
        trunk=TrunkSpec(
            blocks=(Blocks("transformer_blocks", "num_layers"),),
            stream=Stream(
                text="encoder_hidden_states",
                image_aligned=(Aligned("image_rotary_emb", item=0),),
                text_aligned=(Aligned("image_rotary_emb", item=1),),
                returns=("text", "tokens"),
                text_first=True,
            ),
            attention=lambda block: ("joint",),
            tp_plan={},  # the class has a plan of its own
        ),
        latents=Latents(token_pixels=token_pixels),
        text=Text(tokens=lambda configs, asked: int(asked.get("max_sequence_length") or 512)),
        caching=Caching(embeddings=("img_in",), conditioning=CONDITIONING),
        request=RequestSpec(
            defaults={"steps": 50, "guidance": 4.0, "negative": " ", "height": 1024, "width": 1024},
            example='a coffee shop entrance with a chalkboard sign that reads "Qwen Coffee"',
            renamed={"guidance": "true_cfg_scale"},
            uses_cfg=lambda asked: (asked.get("guidance") or 1.0) > 1.0 and asked.get("negative") is not None,
        ),
        unsupported={"controlnet_block_samples": "ControlNet residuals are not divided over ranks yet"},
    )
