"""Check records and results of hooks: a field of another type than its record says is an error that names the owner.

Without torch. The values in mappings and the results of callables are not checked here.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from xdit_core.errors import PluginError
from xdit_core.observe.observer import Observer
from xdit_core.records import SLOTS, Declaration, Problem
from xdit_core.registry.owners import AdapterCall, Owner
from xdit_core.settings import did_you_mean


def check_record(record: Any, cls: type[Any], owner: Owner, hook: str) -> None:
    """Make sure that the result of a hook is a record of a class, and that its fields hold what the class says.

    Raises:
        PluginError: names the owner, the hook and the first field that is wrong.
    """
    if not isinstance(record, cls):
        raise PluginError(f"{owner} must return a {cls.__name__} from {hook}; it returned {shown(record)}.")
    for path, value, wanted in mistakes(record):
        raise PluginError(
            f"{owner} returned a {cls.__name__} from {hook} with {path}={shown(value)}, where {wanted} is expected."
        )


def mistakes(record: Any, path: str = "") -> Iterator[tuple[str, Any, str]]:
    """Path, value and expected type of each field that holds something else."""
    cls: Any = type(record)
    hints = hints_of(cls)
    for field in dataclasses.fields(record):
        value, hint = getattr(record, field.name), hints[field.name]
        inside = f"{path}.{field.name}" if path else field.name
        if not matches(value, hint):
            yield inside, value, wording(hint)
        elif isinstance(value, tuple):
            for i, item in enumerate(value):
                if dataclasses.is_dataclass(item):
                    yield from mistakes(item, f"{inside}[{i}]")
        elif dataclasses.is_dataclass(value) and not isinstance(value, (type, AdapterCall)):
            yield from mistakes(value, inside)


@functools.cache
def hints_of(cls: Any) -> dict[str, Any]:
    """The types of the fields of a record."""
    return typing.get_type_hints(cls)


def matches(value: Any, hint: Any) -> bool:
    """Whether a value is of the type that an annotation names."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (types.UnionType, typing.Union):
        return any(matches(value, option) for option in inner)
    if hint is type(None) or hint is None:
        return value is None
    if origin is tuple:
        items = inner[:1] * len(value) if isinstance(value, tuple) and inner[-1:] == (Ellipsis,) else inner
        return isinstance(value, tuple) and len(items) == len(value) and all(map(matches, value, items))
    if origin is collections.abc.Callable or hint is collections.abc.Callable:
        return callable(value)
    if origin is not None:
        return isinstance(value, origin)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint) if isinstance(hint, type) else True


def wording(hint: Any) -> str:
    """The name of a type for a message."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return " or ".join(wording(option) for option in typing.get_args(hint))
    if hint is type(None):
        return "None"
    return (
        hint.__name__
        if isinstance(hint, type) and not typing.get_args(hint)
        else str(hint).replace("collections.abc.", "")
    )


def shown(value: Any) -> str:
    """A value for a message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def check_declaration(declared: Any, owner: Owner) -> None:
    """Make sure that a hook returned a ``Declaration`` whose slots exist.

    Raises:
        PluginError: it is something else, a field holds something else, or a claim names an unknown slot.
    """
    check_record(declared, Declaration, owner, "xdit_declare")
    known = {slot for slot, _ in SLOTS.values()}
    for claim in declared.claims:
        if claim.slot not in known and "." not in claim.slot:
            raise PluginError(
                f"{owner} claims the slot {claim.slot!r}, which does not exist; {did_you_mean(claim.slot, known)} "
                f"A slot of your own has the plugin's name before it, such as {owner.name}.{claim.slot}."
            )


def problems_of(result: Any, owner: Owner) -> Sequence[Problem]:
    """The problems that ``xdit_check`` returned; None stands for none.

    Raises:
        PluginError: it returned something else than problems.
    """
    if result is None:
        return ()
    if not isinstance(result, (list, tuple)) or not all(isinstance(item, Problem) for item in result):
        raise PluginError(
            f"{owner} must return a list of Problem from xdit_check, or nothing; it returned {shown(result)}."
        )
    for problem in result:
        check_record(problem, Problem, owner, "xdit_check")
    return result


def check_observer(observer: Any, owner: Owner) -> None:
    """What ``xdit_observe`` returned is an observer.

    Raises:
        PluginError: it is something else.
    """
    if not isinstance(observer, Observer):
        raise PluginError(f"{owner} must return an Observer from xdit_observe; it returned {shown(observer)}.")


def check_built(built: Any, declared: typing.Collection[str], transforms: typing.Collection[str], owner: Owner) -> None:
    """Make sure that ``xdit_build`` returned the callables that were declared, and no others.

    Args:
        built: the result, or None if there is no such hook.
        declared: wraps of the plan as ``point/level``.
        transforms: phases of the plan.

    Raises:
        PluginError: something is missing or too much.
    """
    from xdit_core.records import Built

    if built is None and not declared and not transforms:
        return
    check_record(built, Built, owner, "xdit_build")
    for kind, callables, wanted in (("wraps", built.wraps, declared), ("transforms", built.transforms, transforms)):
        for name in sorted(set(wanted) - set(callables)):
            raise PluginError(
                f"{owner} declares {kind[:-1]} {name} but xdit_build gave none; add it to Built({kind}=...)."
            )
        for name in sorted(set(callables) - set(wanted)):
            raise PluginError(
                f"{owner} builds {kind[:-1]} {name} without declaring it, so it would never run; declare it in "
                "xdit_declare."
            )
        for name, value in callables.items():
            if not callable(value):
                raise PluginError(f"{owner} built {shown(value)} for {kind[:-1]} {name}, which cannot be called.")
