"""Z-Image (Z-Image Team 2025, arXiv:2511.22699): blocks over the picture, then over picture and text."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from xdit_core import ModelSpec, hookimpl
from xdit_core.model_spec import Aligned, Blocks, Caching, Checkpoint, Latents, RequestSpec, Stream, Text, TrunkSpec

PADDED = 32  # picture and text are each filled up to a multiple of it
TP_PLAN = MappingProxyType(
    {
        "*.attention.to_[qkv]": "colwise",
        "*.attention.to_out.0": "rowwise",
        "*.feed_forward.w[13]": "colwise",
        "*.feed_forward.w2": "rowwise",
    }
)
ROTARY = (Aligned("freqs_cis", dim=1),)
CONDITIONING = ("t_embedder", "cap_embedder", "context_refiner.[0-9]", "noise_refiner.*.adaLN_*", "layers.*.adaLN_*")
OMNI = "pictures as conditions are not divided over ranks yet"


def text_rows(given: Mapping[str, Any]) -> int:
    """Rows of the longest text of the batch."""
    return max(len(text) + -len(text) % PADDED for text in given["cap_feats"])


@hookimpl
def xdit_model() -> ModelSpec:
    """The adapter."""
    return ModelSpec(
        name="z_image",
        checkpoint=Checkpoint(("ZImagePipeline",), hub="Tongyi-MAI/Z-Image-Turbo"),
        trunk=TrunkSpec(
            blocks=(
                Blocks("noise_refiner", "n_refiner_layers", stream=Stream("x", image_aligned=ROTARY)),
                Blocks("layers", "n_layers", stream=Stream("x", joined=True, joint_aligned=ROTARY)),
            ),
            attention=lambda block: ("self",) if block.layer_id >= 1000 else ("joint",),
            heads="n_heads",
            tp_plan=TP_PLAN,
        ),
        latents=Latents(
            "x", list_inputs=True, frame_dim=2, patch_size="all_patch_size", padding_tokens=lambda n: -n % PADDED
        ),
        text=Text("cap_feats", text_rows, lambda configs, asked: int(asked.get("max_sequence_length") or 512)),
        caching=Caching(conditioning=CONDITIONING),
        request=RequestSpec(
            {"steps": 9, "guidance": 0.0, "height": 1024, "width": 1024},
            example="a young woman in red hanfu at night",
            uses_cfg=lambda asked: (asked.get("guidance") or 0.0) > 0.0,
        ),
        unsupported=dict.fromkeys(("controlnet_block_samples", "siglip_feats", "image_noise_mask"), OMNI),
    )
