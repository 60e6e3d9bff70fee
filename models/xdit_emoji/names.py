"""What the bundled model can draw: its names, and the characters that stand for them (``emoji-test.txt``, Unicode,
Inc.)."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

VARIATION = "\ufe0f"  # asks for the coloured form of a character; keyboards leave it out now and then


@cache
def characters() -> Mapping[str, str]:
    """Character, or sequence of characters, to name; without variation selectors, the longest first."""
    found = json.loads(Path(__file__).with_name("characters.json").read_text(encoding="utf-8"))
    plain = {text.replace(VARIATION, ""): name for text, name in found.items()}
    return MappingProxyType(dict(sorted(plain.items(), key=lambda pair: -len(pair[0]))))


def words(configs: Mapping[str, Any], prompt: str, pictures: int = 1) -> str:
    """The prompt with names in place of characters."""
    text = prompt.replace(VARIATION, "")
    for character, name in characters().items():
        text = text.replace(character, f" {name} ")
    return " ".join(text.split()) if text != prompt.replace(VARIATION, "") else prompt


def note(configs: Mapping[str, Any], prompt: str) -> str:
    """A line for whoever asks for something that the model has never seen, "" for one of its names."""
    text, names = " ".join(words(configs, prompt).lower().split()), sorted(characters().values())
    if any(f" {name} " in f" {text} " for name in names):
        return ""
    shared = [name for name in names if set(name.split()) & set(text.split())]
    near = [*difflib.get_close_matches(text, names, n=4, cutoff=0.6), *shared]
    hint = f"near are {', '.join(dict.fromkeys(near[:4]))}" if near else f"try {names[0]}, rocket or red heart"
    return (
        f"{prompt!r} is none of the {len(names)} names that the emoji model knows, so the picture will be a "
        f"mixture; {hint}"
    )
