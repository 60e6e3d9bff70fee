"""Z-Image (Z-Image Team 2025, arXiv:2511.22699): blocks over the picture, then over picture and text."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from xdit_core import Blocks, ModelSpec, Stream, hookimpl

PADDED = 32  # picture and text are each filled up to a multiple of it
MATRICES = MappingProxyType(
    {
        "*.attention.to_[qkv]": "colwise",
        "*.attention.to_out.0": "rowwise",
        "*.feed_forward.w[13]": "colwise",
        "*.feed_forward.w2": "rowwise",
    }
)
BOTH = ("noise_refiner", "layers")
OMNI = "pictures as conditions are not divided over ranks yet"


def text_rows(given: Mapping[str, Any]) -> int:
    """Rows of the longest text of the batch."""
    return max(len(text) + -len(text) % PADDED for text in given["cap_feats"])


@hookimpl
def xdit_model() -> ModelSpec:
    """The adapter."""
    return ModelSpec(
        name="z_image",
        pipelines=("ZImagePipeline",),
        hub="Tongyi-MAI/Z-Image-Turbo",
        blocks=(
            Blocks("noise_refiner", "n_refiner_layers", stream=Stream(tokens="x", aligned={"freqs_cis": 1})),
            Blocks("layers", "n_layers", stream=Stream(tokens="x", joined=True, joint={"freqs_cis": 1})),
        ),
        attention=lambda block: ("self",) if block.layer_id >= 1000 else ("joint",),
        latents="x",
        listed=True,
        frame_dim=2,
        tail=lambda tokens: -tokens % PADDED,
        text_input="cap_feats",
        text_rows=text_rows,
        heads="n_heads",
        patch="all_patch_size",
        text_tokens=lambda configs, asked: int(asked.get("max_sequence_length") or 512),
        guided=lambda asked: (asked.get("guidance") or 0.0) > 0.0,
        refused={"controlnet_block_samples": OMNI, "siglip_feats": OMNI, "image_noise_mask": OMNI},
        matrices=MATRICES,
        conditioning=("t_embedder", "cap_embedder", "context_refiner.[0-9]", *(f"{part}.*.adaLN_*" for part in BOTH)),
        defaults={
            **{"steps": 9, "guidance": 0.0, "height": 1024, "width": 1024},
            "prompt": ("a young woman in red hanfu at night",),
        },
    )
