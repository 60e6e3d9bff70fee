"""Choose the degrees that the user left open for a number of processes, and order the axes into a mesh."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from xdit_core.records import Axis, Problem, divisors, join_words


@dataclass(frozen=True)
class CompleteMesh:
    """The axes of the mesh with their degrees, or the problems.

    Args:
        axes: outermost first.
        problems: why there is no mesh.
        notes: what was decided, for the user.
    """

    axes: tuple[Axis, ...] = ()
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()


MOST_RANKS = 65_536  # more than any cluster has; above it something only hangs or breaks


def ordered(axes: Iterable[Axis]) -> tuple[Axis, ...]:
    """The axes with the most traffic innermost, so that their ranks are neighbours; ties by name."""
    return tuple(sorted(axes, key=lambda a: (a.traffic, a.name)))


def complete(
    declared: Mapping[str, Sequence[Axis]], nproc: int | None, devices: int, grow: bool, heads: int, model: str
) -> CompleteMesh:
    """Choose the open degrees.

    Args:
        declared: axes by plugin.
        nproc: number of processes that the user gave, which the degrees must then multiply to; None for as many as
            suit.
        devices: processes that suit the machine.
        grow: more processes than devices may be started, so that every selected plugin has something to do. CPU
            processes share cores; GPUs are not shared.
        heads: attention heads of the model, which are divided by the axes that shard heads.
        model: its name, for messages.
    """
    problems = wrong_degrees(declared)
    if problems:
        return CompleteMesh(problems=tuple(problems))
    axes = [a for group in declared.values() for a in group]
    names = [a.name for a in axes]
    duplicates = sorted({n for n in names if names.count(n) > 1})
    if duplicates:
        return CompleteMesh(
            problems=(Problem(f"two plugins declare the axis {join_words(duplicates)}", "drop one of them"),)
        )
    problems = too_few_heads(axes, heads, model)
    if problems:
        return CompleteMesh(problems=tuple(problems))
    fixed = math.prod(a.degree for a in axes if a.degree is not None)
    if fixed > MOST_RANKS:
        large = " and ".join(f"{a.setting or a.name}={a.degree}" for a in axes if a.degree is not None and a.degree > 1)
        return CompleteMesh(
            problems=(Problem(f"{large} need {fixed} processes", f"lower them to at most {MOST_RANKS} together"),)
        )
    open_axes = [a for a in axes if a.degree is None]
    if nproc is not None:
        sizes: Sequence[int] = (nproc,)
    elif not open_axes:
        sizes = (fixed,)
    else:
        sizes = range(1, most_processes(declared, fixed, devices, grow) + 1)
    choices = [(best, size) for size in sizes if (best := fill(declared, open_axes, fixed, size, heads)) is not None]
    if not choices:
        return CompleteMesh(problems=(misfit(declared, axes, open_axes, fixed, nproc or devices, heads),))
    # first that no plugin is idle, then as many processes as possible
    best, size = min(choices, key=lambda pair: (pair[0].idle, -pair[1]))
    degree = dict(zip((a.name for a in open_axes), best.degrees, strict=True))
    mesh = ordered(dataclasses.replace(a, degree=degree.get(a.name, a.degree)) for a in axes)
    return CompleteMesh(axes=mesh, notes=tuple(notes_on(declared, mesh, size)))


def most_processes(declared: Mapping[str, Sequence[Axis]], fixed: int, devices: int, grow: bool) -> int:
    """The most processes that are tried.

    All GPUs are used, and none is shared. Cores are better used by threads than by more processes than the plugins
    need, which is two for each plugin.
    """
    if not grow:
        return max(devices, fixed)
    groups = [g for g in declared.values() if any(a.degree is None for a in g)]
    idle = sum(1 for g in groups if all((a.degree or 1) == 1 for a in g))
    return fixed << idle


def notes_on(declared: Mapping[str, Sequence[Axis]], mesh: Sequence[Axis], size: int) -> Iterator[str]:
    """Sentences about what was decided, for the user."""
    yield processes(mesh, size)
    degree = {a.name: a.degree for a in mesh}
    for name, group in sorted(declared.items()):
        if size > 1 and group and all(degree[a.name] == 1 for a in group):
            yield f"{name} has nothing to divide among {size} processes; give more with nproc=, or set its degrees"


def wrong_degrees(declared: Mapping[str, Sequence[Axis]]) -> list[Problem]:
    """Refuse degrees that the model does not allow, and name those that it allows."""
    problems = []
    for name, group in declared.items():
        for a in group:
            key = a.setting or f"{name}.{a.name}"
            if a.degree is not None and a.degree < 1:
                problems.append(Problem(f"{key}={a.degree} is below 1", "give 1 or more", name))
            elif a.degree is not None and a.choices is not None and a.degree not in a.choices:
                fix = f"use one of {', '.join(map(str, a.choices))}"
                problems.append(Problem(f"{a.why or 'the model'}, which does not fit {key}={a.degree}", fix, name))
    return problems


def too_few_heads(axes: Sequence[Axis], heads: int, model: str) -> list[Problem]:
    """Refuse degrees of axes that shard heads if their product does not divide the number of heads."""
    sharding = [a for a in axes if a.shards_heads and (a.degree or 1) > 1]
    each = math.prod(a.degree or 1 for a in sharding)
    if heads % each == 0:
        return []
    named = " x ".join(f"{a.setting or a.name}={a.degree}" for a in sharding)
    works = ", ".join(str(d) for d in divisors(heads))
    return [
        Problem(
            f"{model} has {heads} heads, which {named} = {each} does not divide", f"make their product one of {works}"
        )
    ]


@dataclass(frozen=True, order=True)
class DegreeChoice:
    """A choice of the open degrees; the smallest is the best.

    Args:
        idle: plugins with nothing to divide.
        resort: product of the degrees of axes that are a last resort.
        total: sum of the degrees.
        by_traffic: the negative degrees, those of the axes with the most traffic first.
        degrees: in the order of the open axes.
    """

    idle: int
    resort: int
    total: int
    by_traffic: tuple[int, ...]
    degrees: tuple[int, ...] = ()


def fill(
    declared: Mapping[str, Sequence[Axis]], open_axes: Sequence[Axis], fixed: int, size: int, heads: int
) -> DegreeChoice | None:
    """The best degrees of the open axes whose product with the fixed degrees is ``size``, None if there are none.

    The best leave the fewest plugins idle; then they have the smallest last resorts, then the smallest sum, then large
    degrees for axes with much traffic.
    """
    if size % fixed:
        return None
    open_product = size // fixed
    best: DegreeChoice | None = None
    options = [[d for d in divisors(open_product) if a.choices is None or d in a.choices] for a in open_axes]
    for combination in itertools.product(*options):
        if math.prod(combination) != open_product:
            continue
        degree = {a.name: d for a, d in zip(open_axes, combination, strict=True)}
        everything = [a for group in declared.values() for a in group]
        if heads % math.prod(a.degree or degree.get(a.name, 1) for a in everything if a.shards_heads):
            continue
        idle = sum(
            1 for group in declared.values() if group and all((a.degree or degree.get(a.name, 1)) == 1 for a in group)
        )
        resort = math.prod(d for a, d in zip(open_axes, combination, strict=True) if a.last_resort)
        by_traffic = tuple(-degree[a.name] for a in sorted(open_axes, key=lambda a: (-a.traffic, a.name)))
        choice = DegreeChoice(idle, resort, sum(combination), by_traffic, combination)
        best = choice if best is None else min(best, choice)
    return best


def misfit(
    declared: Mapping[str, Sequence[Axis]],
    axes: Sequence[Axis],
    open_axes: Sequence[Axis],
    fixed: int,
    nproc: int,
    heads: int,
) -> Problem:
    """Why no degrees fit the number of processes, and which numbers would fit."""
    fixed_degrees = ", ".join(f"{a.setting or a.name}={a.degree}" for a in axes if a.degree is not None)
    around = {*range(1, 17), *range(max(1, nproc - 16), nproc + 17), fixed, 2 * fixed}
    works = [n for n in sorted(around) if fill(declared, open_axes, fixed, n, heads) is not None]
    near = sorted(sorted(works, key=lambda n: abs(n - nproc))[:6])
    because = "; ".join([f"given {fixed_degrees}"] if fixed_degrees else [a.why for a in open_axes if a.why])
    choice = f"use nproc={near[0]}" if len(near) == 1 else f"use one of {', '.join(map(str, near))}"
    return Problem(
        f"nproc={nproc} does not fit the degrees ({because or 'nothing can use more than one process'})",
        f"{choice}, or leave nproc out" if near else "leave nproc out",
    )


def processes(axes: Sequence[Axis], size: int) -> str:
    """A text such as ``4 processes: stages 2 x ulysses 2``, or ``one process``."""
    return f"{size} processes: {describe(axes)}" if size > 1 else describe(axes)


def describe(axes: Sequence[Axis]) -> str:
    """The axes as a text such as ``stages 2 x ulysses 2``."""
    return " x ".join(f"{a.name} {a.degree}" for a in axes if (a.degree or 1) > 1) or "one process"
