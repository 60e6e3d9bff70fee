"""Order what the strategies of a plan attach, and decide which of them owns which slot."""

from __future__ import annotations

from collections.abc import Mapping

from xdit_core.errors import PluginError
from xdit_core.records import PHASES, POINTS, Declaration, Problem


def settle_claims(declared: Mapping[str, Declaration]) -> tuple[dict[str, str], list[Problem]]:
    """Decide which plugin owns which slot; two claims on one slot are a problem that names both plugins."""
    owners: dict[str, tuple[str, str]] = {}
    problems = []
    for name in sorted(declared):
        for claim in declared[name].owns:
            if claim.slot in owners:
                owner, reason = owners[claim.slot]
                problems.append(
                    Problem(
                        f"{owner} and {name} both need the slot {claim.slot!r} ({owner}: {reason}; {name}: "
                        f"{claim.why})",
                        f"drop one of {owner} and {name}",
                        name,
                    )
                )
            else:
                owners[claim.slot] = (name, claim.why)
    return {slot: name for slot, (name, _) in owners.items()}, problems


def sort_wraps(declared: Mapping[str, Declaration]) -> dict[str, tuple[tuple[str, str], ...]]:
    """Sort the wraps of each point by its levels, then by the names of the plugins.

    Raises:
        PluginError: a wrap names a point or level that does not exist.
    """
    pairs_of: dict[str, list[tuple[str, str]]] = {}
    for name in sorted(declared):
        for wrap in declared[name].wraps:
            if wrap.level not in POINTS.get(wrap.point, ()):
                raise PluginError(
                    f"plugin {name} wraps {wrap.point}/{wrap.level}, which does not exist; levels are "
                    + "; ".join(f"{p}: {', '.join(levels)}" for p, levels in POINTS.items())
                    + "."
                )
            pairs_of.setdefault(wrap.point, []).append((wrap.level, name))
    order = {point: {level: i for i, level in enumerate(levels)} for point, levels in POINTS.items()}
    return {
        p: tuple(sorted(pairs, key=lambda pair: (order[p][pair[0]], pair[1]))) for p, pairs in sorted(pairs_of.items())
    }


def sort_transforms(declared: Mapping[str, Declaration]) -> tuple[tuple[str, str], ...]:
    """Sort the transforms by their phases, then by the names of the plugins.

    Raises:
        PluginError: a transform names a phase that does not exist.
    """
    pairs = [(t.phase, name) for name in sorted(declared) for t in declared[name].transforms]
    for phase, name in pairs:
        if phase not in PHASES:
            raise PluginError(
                f"plugin {name} transforms in the phase {phase}, which does not exist; phases are {', '.join(PHASES)}."
            )
    return tuple(sorted(pairs, key=lambda pair: (PHASES.index(pair[0]), pair[1])))
