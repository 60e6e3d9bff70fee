"""PixArt-alpha (Chen et al. 2023, arXiv:2310.00426) and PixArt-Sigma (Chen et al. 2024, arXiv:2403.04692): text by
cross-attention."""

from __future__ import annotations

from types import MappingProxyType

from xdit_core import ModelSpec
from xdit_core.model_spec import Blocks, Caching, Checkpoint, RequestSpec, TrunkSpec

TP_PLAN = MappingProxyType(
    {
        "transformer_blocks.*.attn[12].to_[qkv]": "colwise",
        "transformer_blocks.*.attn[12].to_out.0": "rowwise",
        "transformer_blocks.*.ff.net.0.proj": "colwise",
        "transformer_blocks.*.ff.net.2": "rowwise",
    }
)


def spec(name: str, pipeline: str, hub: str) -> ModelSpec:
    """What the two have in common."""
    return ModelSpec(
        name=name,
        checkpoint=Checkpoint((pipeline,), hub=hub),
        trunk=TrunkSpec(
            (Blocks("transformer_blocks", "num_layers"),), attention=lambda block: ("self", "cross"), tp_plan=TP_PLAN
        ),
        caching=Caching(
            embeddings=("pos_embed",),
            conditioning=("caption_projection", "adaln_single", "transformer_blocks.*.attn2.to_[kv]"),
        ),
        request=RequestSpec(
            {"steps": 20, "guidance": 4.5}, example="a small cactus with a happy face in the Sahara desert"
        ),
        unsupported={"attention_mask": "a mask over the image tokens is not divided over ranks"},
    )
