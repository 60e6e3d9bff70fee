"""Turn the words of the command line and a config file into flat settings. Values stay the text that was written."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from xdit_core.errors import UsageError
from xdit_core.filesystem import read_text, user_path
from xdit_core.settings import parse_words

LARGEST_CONFIG = 2**20  # bytes
KEY = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)*")


def is_setting(word: str) -> bool:
    """Whether a word is a setting: ``steps=20`` is one; ``a sign that says 1+1=2`` is a prompt."""
    key, sign, _ = word.partition("=")
    return bool(sign) and KEY.fullmatch(key) is not None


def values_of(words: Iterable[str], config: str | None = None) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Settings from prompts and ``key=value`` words in any order, on top of a config file.

    Returns:
        The flat settings, and the plugins that the config file names under ``plugins``.

    Raises:
        UsageError: a key given twice, an empty prompt, an unreadable file.
    """
    words = list(words)
    typed = parse_words(word if is_setting(word) else f"prompt={word}" for word in words)
    values = {**(read_config(user_path(config, "--config ")) if config is not None else {}), **typed}
    plugins = values.pop("plugins", ())
    if values.get("prompts") == "-":
        from xdit_core.planning.checks import prompts_in

        values["prompt"] = [*as_list(values.get("prompt", ())), *prompts_in(sys.stdin.read())]
        del values["prompts"]
        if not values["prompt"]:
            raise UsageError("prompts=- but standard input is empty; write one prompt on each line.")
    for prompt in as_list(values.get("prompt", ())):
        if not prompt.strip():
            raise UsageError('the prompt is empty; write what to draw, such as "red heart".')
        if not is_text(prompt):
            raise UsageError(f"the prompt {prompt!r} is not UTF-8 text; write it in UTF-8.")
    return values, tuple(name for item in as_list(plugins) for name in names_in(item))


def names_in(text: str) -> list[str]:
    """The names in a text such as ``a, b``."""
    return [name.strip() for name in text.split(",") if name.strip()]


def as_list(value: str | Iterable[str]) -> list[str]:
    """A list of strings from one string or several."""
    return [value] if isinstance(value, str) else list(value)


def is_text(value: str) -> bool:
    """Whether the terminal passed valid UTF-8."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_config(path: Path) -> dict[str, Any]:
    """A YAML file, or standard input for ``-``, as flat settings: ``usp: {ulysses: 2}`` and ``usp.ulysses: 2`` are the
    same, scalars stay text.

    Raises:
        UsageError: the file cannot be read, is not a map, or gives a key twice.
    """
    import yaml  # type: ignore[import-untyped]

    text = read_text(path, f"--config {path}", "give a YAML file", LARGEST_CONFIG)
    try:
        root = yaml.compose(text, Loader=yaml.BaseLoader)
    except RecursionError as error:
        raise UsageError(f"--config {path} nests too deep; write one setting a line, such as steps: 20.") from error
    except yaml.YAMLError as error:
        raise UsageError(
            f"--config {path} is not valid YAML ({' '.join(str(error).split())}); correct the file."
        ) from error
    if not isinstance(root, yaml.MappingNode):
        raise UsageError(
            f"--config {path} does not hold settings by name; write one setting a line, such as steps: 20."
        )
    return flat(root, path)


def flat(root: Any, path: Path, prefix: str = "") -> dict[str, Any]:
    """The pairs of a YAML map and of the maps in it."""
    values: dict[str, Any] = {}
    for key_node, node in root.value:
        key = f"{prefix}{key_node.value}"
        for name, value in pairs(node, path, key, nested=bool(prefix)).items():
            if name in values:
                raise UsageError(f"--config {path} gives {name} twice; keep one.")
            values[name] = value
    return values


def pairs(node: Any, path: Path, key: str, nested: bool) -> dict[str, Any]:
    """What one value of a map gives: itself, or the pairs of the map that it is."""
    if node.id == "scalar":
        return {key: node.value}
    if node.id == "sequence":
        if any(item.id != "scalar" for item in node.value):
            raise UsageError(f"--config {path}: {key} must be a list of plain values.")
        return {key: [item.value for item in node.value]}
    if nested:
        raise UsageError(f"--config {path}: {key} nests too deep; settings are named plugin.setting.")
    return flat(node, path, f"{key}.")
