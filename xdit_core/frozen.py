"""Frozen records whose mappings cannot be changed either. Without torch."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import fields
from typing import Any


class FrozenDict(dict[str, Any]):
    """A mapping that cannot be changed, nor can those in it; a ``dict`` for everything that reads."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = dict(*args, **kwargs)
        super().__init__({key: frozen(value) for key, value in given.items()})

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            "a mapping inside a frozen record cannot be changed; make another record with dataclasses.replace"
        )

    __setitem__ = __delitem__ = __ior__ = _refuse  # type: ignore[assignment]
    clear = pop = popitem = setdefault = update = _refuse  # type: ignore[assignment]

    def __copy__(self) -> FrozenDict:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenDict:
        return FrozenDict(copy.deepcopy(dict(self), memo))

    def __reduce__(self) -> tuple[type[FrozenDict], tuple[dict[str, Any]]]:
        return FrozenDict, (dict(self),)


def frozen(value: Any) -> Any:
    """A mapping as one that cannot be changed; anything else as it is."""
    return FrozenDict(value) if isinstance(value, Mapping) and not isinstance(value, FrozenDict) else value


class Record:
    """Base of frozen dataclasses that hold mappings: those cannot be changed either."""

    def __post_init__(self) -> None:
        for field_ in fields(self):  # type: ignore[arg-type]
            object.__setattr__(self, field_.name, frozen(getattr(self, field_.name)))
