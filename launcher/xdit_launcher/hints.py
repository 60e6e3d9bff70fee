"""Guess what a newcomer meant: settings written as options, commands that do not exist, prompts without quotes."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence

from xdit_core.errors import UsageError
from xdit_core.settings import RunSettings, fields_of


def meant_setting(option: str, args: Sequence[str]) -> str:
    """``model=emoji`` for ``--model emoji`` and ``--model=emoji``; "" if there is no such setting.

    Args:
        option: the option that click does not know, with its dashes.
        args: all words of the command line.
    """
    name = option.lstrip("-").replace("-", "_")
    if name != "model" and name not in fields_of(RunSettings) and "." not in name:
        return ""
    for i, word in enumerate(args):
        if word == option:
            value = args[i + 1] if i + 1 < len(args) and not args[i + 1].startswith("-") else "..."
            return f"{name}={quoted(value)}"
        if word.startswith(option + "="):
            return f"{name}={quoted(word.removeprefix(option + '='))}"
    return f"{name}=..."


def quoted(value: str) -> str:
    """A value as one writes it in a shell."""
    return f'"{value}"' if " " in value else value


def refuse_unknown_command(words: Sequence[str], commands: Collection[str]) -> None:
    """Refuse a single word without a model, since it was meant as a command and not as a prompt.

    Raises:
        UsageError: says which commands there are.
    """
    if len(words) == 1 and words[0].isidentifier():
        close = difflib.get_close_matches(words[0], commands, n=1, cutoff=0.6)
        meant = f"did you mean {close[0]}?" if close else f"commands are {', '.join(sorted(commands))}."
        raise UsageError(
            f"there is no command {words[0]!r}; {meant} To draw a prompt, name a model too: xdit-launch model=emoji "
            f"{words[0]!r}."
        )


def loose_words(prompts: Sequence[str]) -> str:
    """A note if several prompts look like the words of one, "" otherwise."""
    if len(prompts) < 2 or not all(prompt and " " not in prompt.strip() for prompt in prompts):
        return ""
    shown = ", ".join(prompts[:6]) + (", ..." if len(prompts) > 6 else "")
    return f'{len(prompts)} prompts: {shown}; quote a prompt of several words: "{" ".join(prompts[:6])}".'
