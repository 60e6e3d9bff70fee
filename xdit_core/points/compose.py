"""Nest wraps once, at set-up; afterwards there are only plain calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any

from xdit_core.errors import PluginFailed
from xdit_core.registry.owners import Owner


@dataclass(frozen=True)
class OwnedWrap:
    """A wrap of a plugin.

    Args:
        wrap: ``f(inner, *args)``.
        owner: whose it is.
        place: ``point/level``.
        check: given the first of ``args`` and the result, what is wrong with the result, "" if nothing.
        check_given: given what the wrap calls its inner with, what is wrong with that.
    """

    wrap: Callable[..., Any]
    owner: Owner
    place: str
    check: Callable[[Any, Any], str] | None = None
    check_given: Callable[[tuple[Any, ...]], str] | None = None


def compose(
    wraps: Sequence[Callable[..., Any] | OwnedWrap], base: Callable[..., Any], checked: bool = True
) -> Callable[..., Any]:
    """``base`` inside the wraps ``f(inner, *args)``, the first of them outermost.

    Args:
        checked: look at what the wraps of plugins return.
    """
    within = code_of(base)
    for wrap in reversed(wraps):
        base = bind_owned(wrap, base, within, checked) if isinstance(wrap, OwnedWrap) else bind(wrap, base)
    return base


def bind(wrap: Callable[..., Any], inner: Callable[..., Any]) -> Callable[..., Any]:
    """``wrap`` with its inner bound."""

    def bound(*args: Any, **kwargs: Any) -> Any:
        return wrap(inner, *args, **kwargs)

    return bound


def bind_owned(
    owned: OwnedWrap, inner: Callable[..., Any], within: CodeType | None, checked: bool
) -> Callable[..., Any]:
    """As ``bind``; errors of the wrap itself name its plugin, those of what it is wrapped around pass.

    Args:
        within: code of what lies innermost.

    Raises:
        PluginFailed: from the wrap's own error, or if it returned something else than the point allows.
    """
    wrap, what = owned.wrap, f"its wrap at {owned.place}"
    check, check_given = (owned.check, owned.check_given) if checked else (None, None)

    def checked_inner(*args: Any, **kwargs: Any) -> Any:
        wrong = check_given(args) if check_given is not None else ""
        if wrong:
            raise PluginFailed(
                f"{owned.owner} passed on {wrong} in {what}; correct {owned.owner.name}, or run without it."
            )
        return inner(*args, **kwargs)

    passed = inner if check_given is None else checked_inner

    def bound(*args: Any, **kwargs: Any) -> Any:
        try:
            result = wrap(passed, *args, **kwargs)
        except Exception as error:
            if raised_by(error, within):
                raise
            explained = owned.owner.explain(error, what)
            if explained is error:
                raise
            raise explained from error
        if check is not None:
            wrong = check(args[0], result)
            if wrong:
                raise PluginFailed(
                    f"{owned.owner} returned {wrong} from {what}; correct {owned.owner.name}, or run without it."
                )
        return result

    return bound


def raised_by(error: Exception, within: CodeType | None) -> bool:
    """Whether an error that came out of a wrap was raised further in: by the innermost code or another wrap, which then
    named itself."""
    trace = error.__traceback__.tb_next if error.__traceback__ else None
    while trace is not None:
        code = trace.tb_frame.f_code
        if code is within or code in BOUND:
            return True
        trace = trace.tb_next
    return False


def code_of(function: Any) -> CodeType | None:
    """The code that runs when something is called, None if that is not Python's."""
    function = getattr(function, "func", function)  # of a partial
    if not hasattr(function, "__code__") and not hasattr(function, "__func__"):
        function = type(function).__call__
    return getattr(getattr(function, "__func__", function), "__code__", None)


def _codes() -> frozenset[CodeType]:
    """Of all functions that bind makes."""
    nothing = OwnedWrap(_codes, Owner("", "", "", ""), "")
    return frozenset(c for f in (bind(_codes, _codes), bind_owned(nothing, _codes, None, False)) if (c := code_of(f)))


BOUND = _codes()
