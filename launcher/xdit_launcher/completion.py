"""Completion in a shell: settings as ``key=``, names of models and plugins. See ``docs/use/completion.md``.

Click brings the machinery. Its scripts for bash and zsh put a space behind every word, which would tear ``steps=`` from
its value, and bash splits words at ``=``; the scripts here do neither.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

import click
from click.shell_completion import BashComplete, CompletionItem, ZshComplete, add_completion_class, split_arg_string

BASH = """\
%(complete_func)s() {
    local IFS=$'\\n' line before="${COMP_LINE:0:COMP_POINT}"
    COMPREPLY=()
    while read -r line; do
        [[ $line == *= ]] && compopt -o nospace
        COMPREPLY+=("$line")
    done < <(env COMP_LINE="$before" COMP_BREAKS="$COMP_WORDBREAKS" %(complete_var)s=bash_complete $1)
}
complete -o nosort -F %(complete_func)s %(prog_name)s
"""

ZSH = """\
#compdef %(prog_name)s
%(complete_func)s() {
    local -a settings others
    (( ! $+commands[%(prog_name)s] )) && return 1
    local answer="$(env COMP_WORDS="${words[*]}" COMP_CWORD=$((CURRENT-1)) %(complete_var)s=zsh_complete %(prog_name)s)"
    for line in "${(@f)answer}"; do
        if [[ $line == *= ]]; then settings+=("$line"); elif [[ -n $line ]]; then others+=("$line"); fi
    done
    [[ -n $settings ]] && compadd -U -S '' -a settings
    [[ -n $others ]] && compadd -U -a others
}
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
    %(complete_func)s "$@"
else
    compdef %(complete_func)s %(prog_name)s
fi
"""


class Bash(BashComplete):
    """Completion in bash, of the line up to the cursor."""

    source_template = BASH

    def get_completion_args(self) -> tuple[list[str], str]:
        """The finished words of the line, and the word that is begun."""
        line = os.environ.get("COMP_LINE", "")
        words = split_arg_string(line)[1:]
        return (words, "") if line.endswith(" ") or not words else (words[:-1], words[-1])

    def format_completion(self, item: CompletionItem) -> str:
        """What bash puts in place of its own last word, which begins after the last ``=`` or ``:``."""
        begun = self.get_completion_args()[1]
        cut = max((begun.rfind(mark) + 1 for mark in "=:" if mark in os.environ.get("COMP_BREAKS", "=:")), default=0)
        return str(item.value)[cut:]


class Zsh(ZshComplete):
    """Completion in zsh, with one word on each line."""

    source_template = ZSH

    def format_completion(self, item: CompletionItem) -> str:
        """The word."""
        return str(item.value)


def install() -> None:
    """Make click use these classes."""
    add_completion_class(Bash, "bash")
    add_completion_class(Zsh, "zsh")


def matching(options: Iterable[str], begun: str) -> list[CompletionItem]:
    """The options that begin as the word does."""
    return [CompletionItem(option) for option in options if option.startswith(begun)]


def words(ctx: click.Context, param: click.Parameter, begun: str) -> list[CompletionItem]:
    """Complete a setting, or its value if it has only a few."""
    key, sign, _ = begun.partition("=")
    if sign:
        return matching((f"{key}={value}" for value in values_of(key)), begun)
    return matching(settings(ctx.params.get("plugins") or ()), begun)


def settings(chosen: Iterable[str]) -> Iterator[str]:
    """All settings as ``key=``, those of the chosen plugins too."""
    from xdit_core.registry.registry import Registry
    from xdit_core.settings import ModelSettings, RunSettings, fields_of

    yield "model="
    yield from (f"{name}=" for name in fields_of(RunSettings))
    yield from (f"model.{name}=" for name in fields_of(ModelSettings))
    for name in (name for item in chosen for name in item.split(",")):
        registry = Registry()
        try:
            registry.select([name])
            classes = registry.call("xdit_settings", {name: {}})
        except Exception:  # a broken plugin has no completion; the run says what is wrong with it
            continue
        yield from (f"{name}.{field}=" for field in fields_of(classes.get(name)))


def values_of(key: str) -> Iterable[str]:
    """The values of a setting that has only a few, none for the others."""
    from xdit_core.planning.checks import DTYPES
    from xdit_core.registry.registry import MODELS, Registry

    if key == "model":
        return [*Registry().names(MODELS), "auto"]
    return {"dtype": DTYPES, "device": ("cpu", "cuda"), "output_type": ("image", "latent")}.get(key, ())


def plugins(ctx: click.Context, param: click.Parameter, begun: str) -> list[CompletionItem]:
    """Complete the name of a plugin, after those that are already there: ``usp,pipe``."""
    from xdit_core.registry.registry import STRATEGIES, Registry

    before, comma, _ = begun.rpartition(",")
    chosen = before.split(",")
    return matching((f"{before}{comma}{name}" for name in Registry().names(STRATEGIES) if name not in chosen), begun)


def models(ctx: click.Context, param: click.Parameter, begun: str) -> list[CompletionItem]:
    """Complete the name of a model."""
    from xdit_core.registry.registry import MODELS, Registry

    return matching(Registry().names(MODELS), begun)
