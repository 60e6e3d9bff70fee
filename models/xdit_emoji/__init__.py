"""A small SD3 pipeline with its trained weights in the package: a demonstration that runs anywhere.

It has memorized some 240 pictures of Noto Color Emoji; see ``MODEL_CARD.md`` beside this file.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from xdit_core import ModelSpec, hookimpl
from xdit_emoji.names import note, words
from xdit_sd3 import xdit_model as sd3


@hookimpl
def xdit_model() -> ModelSpec:
    """The SD3 adapter with a bundled checkpoint; without a T5, so without text tokens for one."""
    return dataclasses.replace(
        sd3(),
        name="emoji",
        hub="",
        drawn=words,
        notes=note,
        path=str(Path(__file__).with_name("pipeline")),
        defaults={"steps": 20, "guidance": 3.0, "max_sequence_length": 0, "prompt": ("red heart",)},
    )
