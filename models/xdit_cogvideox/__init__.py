"""CogVideoX 2b, 5b and 1.5 (Yang et al. 2024, arXiv:2408.06072): joint attention with the text first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from xdit_core import ModelSpec, Problem, hookimpl
from xdit_core.model_spec import Aligned, Blocks, Caching, Checkpoint, Latents, RequestSpec, Stream, Text, TrunkSpec

DEFAULTS = MappingProxyType({"steps": 50, "guidance": 6.0, "height": 480, "width": 720, "frames": 49, "fps": 8})


def text_length(configs: Mapping[str, Any], asked: Mapping[str, Any]) -> Iterator[Problem]:
    """A learned table of positions has rows for one length of text only."""
    config, asked_for = configs["transformer"], asked["max_sequence_length"] or 226
    length = config.get("max_text_seq_length", 226)
    if asked_for != length and not config.get("use_rotary_positional_embeddings"):
        what = f"max_sequence_length={asked_for}: this CogVideoX takes texts of {length} tokens"
        yield Problem(what, f"give {length}")


@hookimpl
def xdit_model() -> ModelSpec:
    """The adapter."""
    return ModelSpec(
        name="cogvideox",
        checkpoint=Checkpoint(("CogVideoXPipeline",), hub="THUDM/CogVideoX-2b"),
        trunk=TrunkSpec(
            blocks=(Blocks("transformer_blocks", "num_layers"),),
            stream=Stream(
                text="encoder_hidden_states",
                image_aligned=(Aligned("image_rotary_emb"),),
                returns=("tokens", "text"),
                text_first=True,
            ),
            attention=lambda block: ("joint",),
            tp_plan={
                "transformer_blocks.*.attn1.to_[qkv]": "colwise",
                "transformer_blocks.*.attn1.to_out.0": "rowwise",
                "transformer_blocks.*.ff.net.0.proj": "colwise",
                "transformer_blocks.*.ff.net.2": "rowwise",
                "transformer_blocks.*.norm[12].linear": "gathered",
            },
        ),
        latents=Latents(
            frame_dim=1,
            frame_step=lambda configs: int(configs["vae"].get("temporal_compression_ratio", 4)),
            patch_frames="patch_size_t",
        ),
        text=Text(tokens=lambda configs, asked: int(asked.get("max_sequence_length") or 226)),
        unbatched_args=("image_rotary_emb",),
        caching=Caching(
            conditioning=("patch_embed.text_proj", "time_embedding", "transformer_blocks.*.norm[12].linear")
        ),
        request=RequestSpec(
            DEFAULTS, example="a panda plays a guitar in a bamboo forest", not_taken=("images",), check=text_length
        ),
    )
