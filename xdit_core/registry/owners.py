"""Name the owner of code that failed: the plugin or adapter, with its distribution and version. Without torch."""

from __future__ import annotations

import dataclasses
import inspect
import traceback
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from types import MappingProxyType
from typing import Any

from xdit_core.errors import PluginFailed, XditError
from xdit_core.faults import fault_of_machine
from xdit_core.model_spec import ModelSpec

# What the callables of an adapter return, where the core relies on it.
RESULTS: Mapping[str, type | tuple[type, ...]] = MappingProxyType(
    {
        "trunk.attention": tuple,
        "trunk.long_skips": Mapping,
        "latents.frame_step": Integral,
        "latents.row_unit": Integral,
        "latents.padding_tokens": Integral,
        "latents.token_pixels": Integral,
        "text.rows": Integral,
        "text.tokens": Integral,
        "request.check": (list, tuple),
    }
)


@dataclass(frozen=True)
class Owner:
    """A plugin or an adapter, for messages.

    Args:
        kind: ``plugin`` or ``adapter``.
    """

    kind: str
    name: str
    distribution: str
    version: str

    def __str__(self) -> str:
        if self.distribution == "(given)":  # it was passed to the registry and is not installed
            return f"{self.kind} {self.name}"
        return f"{self.kind} {self.name} of {self.distribution} {self.version}"

    def explain(self, error: Exception, what: str) -> Exception:
        """The error to raise in place of one that came out of this owner's code.

        Args:
            error: that came out.
            what: the part of the owner's code that failed.

        Returns:
            A ``PluginFailed``; or ``error`` itself, if it is a sentence for the user already, or if the machine or
            another rank is at fault, which the report of failures tells by the type: then it gets a note.
        """
        if isinstance(error, XditError):
            return error
        if fault_of_machine(error):
            error.add_note(f"This happened in {what} of {self}.")
            return error
        text = str(error).strip().rstrip(".")
        return PluginFailed(
            f"{self} failed in {what}: {type(error).__name__}{f': {text}' if text else ''}{line_of(error)}."
        )

    def call(self, what: str, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function of this owner, and explain its errors; see `explain`."""
        try:
            return function(*args)
        except Exception as error:
            explained = self.explain(error, what)
            if explained is error:
                raise
            raise explained from error


def line_of(error: BaseException) -> str:
    """File and line where an error was raised, in brackets."""
    frames = traceback.extract_tb(error.__traceback__)
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""


@dataclass(frozen=True)
class AdapterCall:
    """A callable of an adapter: its errors, and results of another kind than the core relies on, name the adapter."""

    function: Callable[..., Any]
    owner: Owner
    field: str

    def __post_init__(self) -> None:
        # of the object and not of the class, whose own signature would be looked for there
        object.__setattr__(self, "__wrapped__", self.function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it."""
        try:
            result = self.function(*args, **kwargs)
            if inspect.isgenerator(result):
                result = list(result)
        except Exception as error:
            explained = self.owner.explain(error, f"its {self.field}")
            if explained is error:
                raise
            raise explained from error
        wanted = RESULTS.get(self.field, object)
        if not isinstance(result, wanted):
            names = " or ".join(k.__name__ for k in (wanted if isinstance(wanted, tuple) else (wanted,)))
            raise PluginFailed(
                f"{self.owner} returned {result!r:.60} from its {self.field}, where {names} is expected."
            )
        return result


def owned_spec(spec: ModelSpec, origin: tuple[str, str]) -> ModelSpec:
    """The record of an adapter that knows whose it is, and whose callables name it in their errors.

    Args:
        origin: distribution and version.
    """
    owner = Owner("adapter", spec.name, *origin)
    owned: ModelSpec = owned_record(spec, owner)
    return dataclasses.replace(owned, owner=str(owner))


def owned_record(record: Any, owner: Owner, path: str = "") -> Any:
    """A record, with those inside it, whose callables name their owner and their field in errors.

    Args:
        path: fields that lead to the record, such as ``trunk.``.
    """
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(record):
        value, name = getattr(record, field.name), f"{path}{field.name}"
        if isinstance(value, AdapterCall) or value is field.default:
            continue
        if callable(value):
            changes[field.name] = AdapterCall(value, owner, name)
        elif dataclasses.is_dataclass(value):
            changes[field.name] = owned_record(value, owner, f"{name}.")
        elif isinstance(value, tuple):
            changes[field.name] = tuple(
                owned_record(item, owner, f"{name}[{i}].") if dataclasses.is_dataclass(item) else item
                for i, item in enumerate(value)
            )
    return dataclasses.replace(record, **changes)


class OwnedContext(AbstractContextManager[None]):
    """A context that a plugin makes, whose errors name the plugin; it cannot swallow an error from inside.

    Args:
        make: makes it.
        owner: the plugin.
        what: the context is around.
    """

    def __init__(self, make: Callable[[], AbstractContextManager[None]], owner: Owner, what: str) -> None:
        self._make, self._owner, self._what = make, owner, what

    def __enter__(self) -> None:
        def enter() -> AbstractContextManager[None]:
            context = self._make()
            context.__enter__()
            return context

        self._context = self._owner.call(f"the begin of {self._what}", enter)

    def __exit__(self, *details: Any) -> None:
        try:
            self._context.__exit__(*details)
        except Exception as error:
            explained = error if error is details[1] else self._owner.explain(error, f"the end of {self._what}")
            if explained is error:
                raise
            raise explained from error
