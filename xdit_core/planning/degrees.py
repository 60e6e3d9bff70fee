"""Complete open degrees for a number of processes, and order the axes into a mesh."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from xdit_core.records import Axis, Problem, divisors, join_words


@dataclass(frozen=True)
class Completed:
    """Axes with degrees, outermost first, or the problems."""

    axes: tuple[Axis, ...] = ()
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()


def product(values: Iterable[int]) -> int:
    """Product of integers."""
    return math.prod(values)


MOST_RANKS = 65_536  # more than any cluster has; above it only hangs or breaks something


def ordered(axes: Iterable[Axis]) -> tuple[Axis, ...]:
    """Chatty axes innermost, so that their ranks are neighbours; ties by name."""
    return tuple(sorted(axes, key=lambda a: (a.traffic, a.name)))


def complete(
    declared: Mapping[str, Sequence[Axis]], nproc: int | None, devices: int, grow: bool, heads: int, model: str
) -> Completed:
    """Choose the open degrees.

    Args:
        declared: axes by plugin.
        nproc: processes asked for; the degrees must then multiply to exactly that. None: as many as suit.
        devices: processes that suit the machine.
        grow: more processes than devices may be started so that every selected plugin has something to do
            (CPU processes share cores; GPUs are not shared).
        heads: attention heads of the model, to be divided by the axes that shard heads.
        model: its name, for messages.
    """
    problems = wrong_degrees(declared)
    if problems:
        return Completed(problems=tuple(problems))
    axes = [a for group in declared.values() for a in group]
    names = [a.name for a in axes]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        return Completed(problems=(Problem(f"two plugins declare the axis {join_words(twice)}", "drop one of them"),))
    problems = too_few_heads(axes, heads, model)
    if problems:
        return Completed(problems=tuple(problems))
    fixed = product(a.degree for a in axes if a.degree is not None)
    if fixed > MOST_RANKS:
        given = " and ".join(f"{a.setting or a.name}={a.degree}" for a in axes if a.degree is not None and a.degree > 1)
        return Completed(
            problems=(Problem(f"{given} need {fixed} processes", f"lower them to at most {MOST_RANKS} together"),)
        )
    open_axes = [a for a in axes if a.degree is None]
    if nproc is not None:
        sizes: Sequence[int] = (nproc,)
    elif not open_axes:
        sizes = (fixed,)
    else:
        sizes = range(1, most_processes(declared, fixed, devices, grow) + 1)
    found = [(best, size) for size in sizes if (best := fill(declared, open_axes, fixed, size, heads)) is not None]
    if not found:
        return Completed(problems=(misfit(declared, axes, open_axes, fixed, nproc or devices, heads),))
    best, size = min(found, key=lambda pair: (pair[0].idle, -pair[1]))  # all at work, then as many as there can be
    degree = dict(zip((a.name for a in open_axes), best.degrees, strict=True))
    done = ordered(dataclasses.replace(a, degree=degree.get(a.name, a.degree)) for a in axes)
    return Completed(axes=done, notes=tuple(notes_on(declared, done, size)))


def most_processes(declared: Mapping[str, Sequence[Axis]], fixed: int, devices: int, grow: bool) -> int:
    """GPUs are all used and never shared. Cores are better used by threads than by more processes than the plugins
    need: two for each."""
    if not grow:
        return max(devices, fixed)
    groups = [g for g in declared.values() if any(a.degree is None for a in g)]
    idle = sum(1 for g in groups if all((a.degree or 1) == 1 for a in g))
    return fixed << idle


def notes_on(declared: Mapping[str, Sequence[Axis]], done: Sequence[Axis], size: int) -> Iterator[str]:
    """What was decided, for the screen."""
    yield processes(done, size)
    degree = {a.name: a.degree for a in done}
    for name, group in sorted(declared.items()):
        if size > 1 and group and all(degree[a.name] == 1 for a in group):
            yield f"{name} has nothing to divide among {size} processes; give more with nproc=, or set its degrees"


def wrong_degrees(declared: Mapping[str, Sequence[Axis]]) -> list[Problem]:
    """Degrees that the model does not allow, with those that it does."""
    found = []
    for name, group in declared.items():
        for a in group:
            key = a.setting or f"{name}.{a.name}"
            if a.degree is not None and a.degree < 1:
                found.append(Problem(f"{key}={a.degree} is below 1", "give 1 or more", name))
            elif a.degree is not None and a.choices is not None and a.degree not in a.choices:
                fix = f"use one of {', '.join(map(str, a.choices))}"
                found.append(Problem(f"{a.why or 'the model'}, which does not fit {key}={a.degree}", fix, name))
    return found


def too_few_heads(axes: Sequence[Axis], heads: int, model: str) -> list[Problem]:
    """Axes that divide the heads among themselves whose given degrees do not."""
    given = [a for a in axes if a.shards_heads and (a.degree or 1) > 1]
    each = product(a.degree or 1 for a in given)
    if heads % each == 0:
        return []
    named = " x ".join(f"{a.setting or a.name}={a.degree}" for a in given)
    works = ", ".join(str(d) for d in divisors(heads))
    return [
        Problem(
            f"{model} has {heads} heads, which {named} = {each} do not divide", f"make their product one of {works}"
        )
    ]


@dataclass(frozen=True, order=True)
class Filled:
    """Degrees of the open axes; the smaller, the better."""

    idle: int
    resort: int
    total: int
    chatty: tuple[int, ...]
    degrees: tuple[int, ...] = ()


def fill(
    declared: Mapping[str, Sequence[Axis]], open_axes: Sequence[Axis], fixed: int, size: int, heads: int
) -> Filled | None:
    """Degrees of the open axes whose product with the fixed ones is ``size``; the best, or None.

    Best: fewest plugins left idle, then the smallest last resorts, then the smallest sum, then large degrees for chatty
        axes.
    """
    if size % fixed:
        return None
    rest = size // fixed
    best: Filled | None = None
    options = [[d for d in divisors(rest) if a.choices is None or d in a.choices] for a in open_axes]
    for combination in itertools.product(*options):
        if product(combination) != rest:
            continue
        degree = {a.name: d for a, d in zip(open_axes, combination, strict=True)}
        everything = [a for group in declared.values() for a in group]
        if heads % product(a.degree or degree.get(a.name, 1) for a in everything if a.shards_heads):
            continue
        idle = sum(
            1 for group in declared.values() if group and all((a.degree or degree.get(a.name, 1)) == 1 for a in group)
        )
        resort = product(d for a, d in zip(open_axes, combination, strict=True) if a.last_resort)
        chatty = tuple(-degree[a.name] for a in sorted(open_axes, key=lambda a: (-a.traffic, a.name)))
        filled = Filled(idle, resort, sum(combination), chatty, combination)
        best = filled if best is None else min(best, filled)
    return best


def misfit(
    declared: Mapping[str, Sequence[Axis]],
    axes: Sequence[Axis],
    open_axes: Sequence[Axis],
    fixed: int,
    nproc: int,
    heads: int,
) -> Problem:
    """Why no degrees fit the processes asked for, and which numbers would."""
    given = ", ".join(f"{a.setting or a.name}={a.degree}" for a in axes if a.degree is not None)
    around = {*range(1, 17), *range(max(1, nproc - 16), nproc + 17), fixed, 2 * fixed}
    works = [n for n in sorted(around) if fill(declared, open_axes, fixed, n, heads) is not None]
    near = sorted(sorted(works, key=lambda n: abs(n - nproc))[:6])
    because = "; ".join([f"given {given}"] if given else [a.why for a in open_axes if a.why])
    choice = f"use nproc={near[0]}" if len(near) == 1 else f"use one of {', '.join(map(str, near))}"
    return Problem(
        f"nproc={nproc} does not fit the degrees ({because or 'nothing can use more than one process'})",
        f"{choice}, or leave nproc out" if near else "leave nproc out",
    )


def processes(axes: Sequence[Axis], size: int) -> str:
    """``4 processes: stages 2 x ulysses 2``, and of one only that it is one."""
    return f"{size} processes: {describe(axes)}" if size > 1 else describe(axes)


def describe(axes: Sequence[Axis]) -> str:
    """``stages 2 x ulysses 2``."""
    return " x ".join(f"{a.name} {a.degree}" for a in axes if (a.degree or 1) > 1) or "one process"
