"""HunyuanDiT (Li et al. 2024, arXiv:2405.08748): later blocks take the tokens behind earlier ones, text by
cross-attention."""

from __future__ import annotations

from types import MappingProxyType

from xdit_core import ModelSpec, hookimpl
from xdit_core.model_spec import Aligned, Blocks, Caching, Checkpoint, RequestSpec, Stream, TrunkSpec

TP_PLAN = MappingProxyType(
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
        checkpoint=Checkpoint(("HunyuanDiTPipeline",), hub="Tencent-Hunyuan/HunyuanDiT-v1.2-Diffusers"),
        trunk=TrunkSpec(
            blocks=(Blocks("blocks", "num_layers"),),
            stream=Stream(image_aligned=(Aligned("image_rotary_emb"),), skip="skip"),
            attention=lambda block: ("self", "cross"),
            long_skips=long_skips,
            tp_plan=TP_PLAN,
        ),
        caching=Caching(
            conditioning=("time_extra_emb", "text_embedder", "blocks.*.norm1.linear", "blocks.*.attn2.to_[kv]")
        ),
        request=RequestSpec(
            defaults={"steps": 50, "guidance": 5.0, "height": 1024, "width": 1024},
            example="an astronaut riding a horse",
            not_taken=("max_sequence_length",),
        ),
        unsupported={"controlnet_block_samples": "ControlNet residuals are not divided over ranks yet"},
    )
