"""Decide which rank runs on which machine, and warn of axes that then exchange much over the network. Without torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import TYPE_CHECKING

from xdit_core.errors import UsageError
from xdit_core.records import Axis, Traffic
from xdit_core.registry.registry import STRATEGIES, Registry
from xdit_launcher.inspection import inspect_strategy

if TYPE_CHECKING:
    from xdit_core.plan import Plan


def together(plan: Plan) -> int:
    """How many neighbouring ranks exchange data at every layer, and should share a machine."""
    return prod(a.degree or 1 for a in plan.axes if a.traffic >= Traffic.PER_LAYER)


def spread(world: int, slots: Sequence[int], unit: int = 1) -> list[range]:
    """Give each machine neighbouring ranks, as evenly as the slots allow.

    Args:
        world: number of ranks.
        slots: the most ranks of each machine.
        unit: so many neighbours stay on one machine if that is possible and leaves no machine without work.

    Raises:
        UsageError: there are fewer slots than ranks.
    """
    if sum(slots) < world:
        raise UsageError(
            f"{world} processes need {world} slots, and all hosts together have {sum(slots)}; lower the degrees, or "
            "name more hosts."
        )
    if world % unit or world // unit < len(slots) or sum(n // unit for n in slots) * unit < world:
        unit = 1
    counts = [0] * len(slots)
    for _ in range(world // unit):
        free = [i for i, n in enumerate(counts) if n + unit <= slots[i]]
        counts[min(free, key=lambda i: counts[i])] += unit
    starts = [sum(counts[:i]) for i in range(len(counts))]
    return [range(s, s + n) for s, n in zip(starts, counts, strict=True)]


def spans(plan: Plan, axis: Axis, places: Sequence[Sequence[int]]) -> bool:
    """Whether ranks that differ along one axis only are on different machines.

    Args:
        places: the ranks of each machine.
    """
    inside = prod(a.degree or 1 for a in plan.axes[plan.axes.index(axis) + 1 :])
    degree = axis.degree or 1
    host = {rank: i for i, ranks in enumerate(places) for rank in ranks}
    lines = ([base + k * inside for k in range(degree)] for base in range(plan.world) if base // inside % degree == 0)
    return any(len({host[rank] for rank in line}) > 1 for line in lines)


def warnings(plan: Plan, places: Sequence[Sequence[int]]) -> Iterator[str]:
    """A sentence for each axis that exchanges data at every layer across several machines, with a better layout.

    Args:
        places: the ranks of each machine.
    """
    used = [ranks for ranks in places if len(ranks)]
    for axis in plan.axes:
        if axis.traffic >= Traffic.PER_LAYER and (axis.degree or 1) > 1 and spans(plan, axis, used):
            name = f"{axis.setting or axis.name}={axis.degree}"
            yield (
                f"warning: {name} spans {len(used)} machines, and its ranks exchange data at every layer; "
                f"{better(plan, axis, len(used))}."
            )


def better(plan: Plan, axis: Axis, machines: int) -> str:
    """What to change so that an axis stays inside each machine, and one that exchanges less spans them."""
    degree = axis.degree or 1
    if degree % machines:
        return "keep its ranks on one machine"
    fewer = f"better is {axis.setting or axis.name}={degree // machines}"
    for other in plan.axes:
        wider = (other.degree or 1) * machines
        if other.traffic < Traffic.PER_LAYER and other.setting and (other.choices is None or wider in other.choices):
            return f"{fewer} {other.setting}={wider}"
    return f"{fewer} with one of {', '.join(plugins_with_little_traffic())} across the machines"


def plugins_with_little_traffic() -> list[str]:
    """Names of installed plugins whose ranks exchange data less often than at every layer."""
    strategies = [
        inspect_strategy(plugin) for plugins in Registry().installed(STRATEGIES).values() for plugin in plugins
    ]
    return [
        strategy.plugin.name
        for strategy in strategies
        if (declared := strategy.declaration)
        and declared.axes
        and all(axis.traffic < Traffic.PER_RING_HOP for axis in declared.axes)
    ]
