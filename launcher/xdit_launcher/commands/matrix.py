"""Which strategies can be combined, found by making the plans. Without torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from xdit_core.errors import PlanRefused, PluginError, UsageError, XditError
from xdit_core.planning.planner import make_plan, only_observes
from xdit_core.registry.registry import STRATEGIES, Registry

DEVICES = 8


def verdict(plugins: Sequence[str], values: Mapping[str, Any]) -> tuple[str, str]:
    """The fidelity of a set of strategies (``exact``, ``displaced`` ...), or ``no`` and why not."""
    try:
        plan = make_plan(plugins, values, devices=DEVICES)
    except PlanRefused as refused:
        return "no", " ".join(str(problem) for problem in refused.problems)
    except XditError as error:
        return "no", str(error)
    return plan.exactness, ""


def strategies() -> list[str]:
    """Names of the installed strategies, without plugins that only observe, which go with everything.

    A plugin that cannot be loaded stays in the list, so that the matrix says why.
    """
    registry, names = Registry(), []
    for name in registry.names(STRATEGIES):
        try:
            registry.select([name])
        except (PluginError, UsageError):
            names.append(name)
        else:
            names += [] if only_observes(registry, name) else [name]
    return names


def lines(values: Mapping[str, Any], names: Sequence[str] | None = None) -> Iterator[str]:
    """A Markdown table of all pairs, and the reasons of those that are refused.

    Args:
        values: settings of the plans, at least ``model``.
        names: the strategies, by default the installed ones.
    """
    make_plan((), values, devices=DEVICES)  # refuses here what is wrong without any strategy
    names = strategies() if names is None else names
    verdicts = {(a, b): verdict(sorted({a, b}), values) for a in names for b in names if a <= b}
    reasons: dict[str, int] = {}
    for _, why in verdicts.values():
        if why:
            reasons.setdefault(why, len(reasons) + 1)
    wide = max(len(n) for n in names)
    yield f"| {'':{wide}} | " + " | ".join(names) + " |"
    yield f"|{'-' * (wide + 2)}|" + "|".join("---" for _ in names) + "|"
    for a in names:
        cells = []
        for b in names:
            kind, why = verdicts[min(a, b), max(a, b)]
            cells.append(f"no ({reasons[why]})" if why else kind)
        yield f"| {a:{wide}} | " + " | ".join(cells) + " |"
    yield ""
    for why, number in reasons.items():
        yield f"{number}. {why}"


def refused_triples(values: Mapping[str, Any], names: Sequence[str]) -> Iterator[str]:
    """A line for each triple that is refused although each pair in it works."""
    for triple in combinations(names, 3):
        if all(verdict(pair, values)[0] != "no" for pair in combinations(triple, 2)):
            kind, why = verdict(triple, values)
            if kind == "no":
                yield f"- {', '.join(triple)}: {why}"
