"""DiT (Peebles and Xie 2022, arXiv:2212.09748): draws ImageNet classes at one size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from xdit_core import ModelSpec, PlanRefused, Problem, default_size, hookimpl
from xdit_core.model_spec import Blocks, Caching, Checkpoint, RequestSpec, Text, TrunkSpec


def labels(configs: Mapping[str, Any], word: str, pictures: int) -> list[int]:
    """The number of a class for each picture; ``word`` is a number, or one of the names in the checkpoint."""
    count = int(configs["transformer"].get("num_embeds_ada_norm") or 1000)
    names = configs["_index"].get("id2label") or {}
    known = {name.strip(): int(i) for i, all_of in names.items() for name in all_of.split(",")}
    number = known.get(word, int(word) if word.isascii() and word.isdigit() else -1)
    if not 0 <= number < count:
        fix = f"give a number from 0 to {count - 1}" + (f" or a name such as {next(iter(known))}" if known else "")
        raise PlanRefused([Problem(f"class={word} is none of the {count} classes", fix)])
    return [number] * pictures


def one_size(configs: Mapping[str, Any], asked: Mapping[str, Any]) -> Iterator[Problem]:
    """The positions are those of the size it was trained for."""
    side = default_size(configs["transformer"], configs)
    if (asked["height"], asked["width"]) != (side, side):
        size = f"height={asked['height']} width={asked['width']}"
        yield Problem(f"{size}: this DiT draws {side} x {side} only", "leave both out")


@hookimpl
def xdit_model() -> ModelSpec:
    """The adapter."""
    return ModelSpec(
        name="dit",
        checkpoint=Checkpoint(("DiTPipeline",), hub="facebook/DiT-XL-2-256"),
        trunk=TrunkSpec(
            blocks=(Blocks("transformer_blocks", "num_layers"),),
            shared_submodules=("norm1.emb",),
            tp_plan={
                "transformer_blocks.*.attn1.to_[qkv]": "colwise",
                "transformer_blocks.*.attn1.to_out.0": "rowwise",
                "transformer_blocks.*.ff.net.0.proj": "colwise",
                "transformer_blocks.*.ff.net.2": "rowwise",
            },
        ),
        text=Text("class_labels"),
        caching=Caching(conditioning=("transformer_blocks.*.norm1.emb", "transformer_blocks.*.norm1.linear")),
        request=RequestSpec(
            defaults={"steps": 50, "guidance": 4.0},
            example="207",
            renamed={"class": "class_labels"},
            not_taken=("images", "height", "width", "negative", "max_sequence_length"),
            subject="class",
            encode_subject=labels,
            check=one_size,
            latent_output=False,
        ),
    )
