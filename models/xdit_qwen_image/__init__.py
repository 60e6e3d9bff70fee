"""Qwen-Image (Wu et al. 2025, arXiv:2508.02324): picture and text in joint attention, packed latents, true guidance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xdit_core import Blocks, ModelSpec, Stream, hookimpl


def token_pixels(configs: Mapping[str, Any]) -> int:
    """Two latent elements a side."""
    halvings: list[bool] = configs.get("vae", {}).get("temperal_downsample") or [False, True, True]
    return int(2 * 2 ** len(halvings))


@hookimpl
def xdit_model() -> ModelSpec:
    """The adapter."""
    return ModelSpec(
        name="qwen_image",
        pipelines=("QwenImagePipeline",),
        hub="Qwen/Qwen-Image",
        blocks=(Blocks("transformer_blocks", "num_layers"),),
        stream=Stream(
            text="encoder_hidden_states",
            aligned={"image_rotary_emb.0": 0},
            words={"image_rotary_emb.1": 0},
            returns=("text", "tokens"),
            text_first=True,
        ),
        attention=lambda block: ("joint",),
        token_pixels=token_pixels,
        text_tokens=lambda configs, asked: int(asked.get("max_sequence_length") or 512),
        guided=lambda asked: (asked.get("guidance") or 1.0) > 1.0 and asked.get("negative") is not None,
        refused={"controlnet_block_samples": "ControlNet residuals are not divided over ranks yet"},
        matrices={},  # diffusers' own
        embeddings=("img_in",),
        conditioning=(
            "txt_norm",
            "time_text_embed",
            "txt_in",
            "pos_embed",
            "transformer_blocks.*.img_mod",
            "transformer_blocks.*.txt_mod",
        ),
        defaults={
            **{"steps": 50, "guidance": 4.0, "negative": " ", "height": 1024, "width": 1024},
            "prompt": ('a coffee shop entrance with a chalkboard sign that reads "Qwen Coffee"',),
        },
        call={"guidance": "true_cfg_scale"},
    )
