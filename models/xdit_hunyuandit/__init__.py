"""HunyuanDiT (Li et al. 2024, arXiv:2405.08748): later blocks take the tokens behind earlier ones, text by
cross-attention."""

from __future__ import annotations

from types import MappingProxyType

from xdit_core import Blocks, ModelSpec, Stream, hookimpl

MATRICES = MappingProxyType(
    {
        "blocks.*.attn[12].to_[qkv]": "colwise",
        "blocks.*.attn[12].to_out.0": "rowwise",
        "blocks.*.ff.net.0.proj": "colwise",
        "blocks.*.ff.net.2": "rowwise",
    }
)


def long_skips(count: int) -> dict[int, int]:
    """The blocks of the second half take what came out of those of the first half, the last what came out of the
    first."""
    return {i: count - 1 - i for i in range(count // 2 + 1, count)}


@hookimpl
def xdit_model() -> ModelSpec:
    """The adapter."""
    return ModelSpec(
        name="hunyuandit",
        pipelines=("HunyuanDiTPipeline",),
        hub="Tencent-Hunyuan/HunyuanDiT-v1.2-Diffusers",
        blocks=(Blocks("blocks", "num_layers"),),
        stream=Stream(aligned={"image_rotary_emb": 0}, skip="skip"),
        attention=lambda block: ("self", "cross"),
        long_skips=long_skips,
        matrices=MATRICES,
        conditioning=("time_extra_emb", "text_embedder", "blocks.*.norm1.linear", "blocks.*.attn2.to_[kv]"),
        refused={"controlnet_block_samples": "ControlNet residuals are not divided over ranks yet"},
        defaults={
            "steps": 50,
            "guidance": 5.0,
            "height": 1024,
            "width": 1024,
            "prompt": ("an astronaut riding a horse",),
        },
        call={"max_sequence_length": ""},
    )
