"""A small SD3 pipeline with its trained weights in the package: a demonstration that runs anywhere.

It has memorized some 240 pictures of Noto Color Emoji; see ``MODEL_CARD.md`` beside this file.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from xdit_core import ModelSpec, hookimpl
from xdit_core.model_spec import RequestSpec
from xdit_emoji.names import note, words
from xdit_sd3 import xdit_model as sd3


@hookimpl
def xdit_model() -> ModelSpec:
    """The SD3 adapter with a bundled checkpoint that has no T5, so no text tokens of one either."""
    spec = sd3()
    return replace(
        spec,
        name="emoji",
        checkpoint=replace(spec.checkpoint, hub="", path=str(Path(__file__).with_name("pipeline"))),
        request=RequestSpec(
            defaults={"steps": 20, "guidance": 3.0, "max_sequence_length": 0},
            example="red heart",
            encode_subject=words,
            notes=note,
        ),
    )
