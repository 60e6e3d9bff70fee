"""Turns the wraps of an extension point into one function, in which each wrap gets the next one as its ``inner``.

The engine does this once, when it is built; a run then makes plain Python calls. An error that comes out of a wrap is
explained with the plugin that the wrap belongs to, and what a wrap passes on or returns can be checked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any

from xdit_core.errors import PluginFailed
from xdit_core.registry.owners import Owner


@dataclass(frozen=True)
class OwnedWrap:
    """A wrap, with the plugin that it belongs to.

    Args:
        wrap: ``f(inner, *args)``.
        owner: the plugin.
        place: ``point/level``.
        check: called with the first of ``args`` and the result; says what is wrong with the result, or "".
        check_given: called with the arguments that the wrap gives to its inner; says what is wrong with them, or "".
    """

    wrap: Callable[..., Any]
    owner: Owner
    place: str
    check: Callable[[Any, Any], str] | None = None
    check_given: Callable[[tuple[Any, ...]], str] | None = None


def compose(
    wraps: Sequence[Callable[..., Any] | OwnedWrap], base: Callable[..., Any], checked: bool = True
) -> Callable[..., Any]:
    """Return a function that calls the wraps ``f(inner, *args)``, the first of them outermost, around ``base``.

    Args:
        checked: look at what the wraps of plugins return.
    """
    within = code_of(base)
    for wrap in reversed(wraps):
        base = bind_owned(wrap, base, within, checked) if isinstance(wrap, OwnedWrap) else bind(wrap, base)
    return base


def bind(wrap: Callable[..., Any], inner: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``wrap`` as a function that no longer needs its ``inner``."""

    def bound(*args: Any, **kwargs: Any) -> Any:
        return wrap(inner, *args, **kwargs)

    return bound


def bind_owned(
    owned: OwnedWrap, inner: Callable[..., Any], within: CodeType | None, checked: bool
) -> Callable[..., Any]:
    """Do what ``bind`` does, and name the plugin in errors of the wrap itself; errors from further in pass unchanged.

    Args:
        within: code of the innermost function.

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
    """Whether an error that came out of a wrap was raised further in, by the innermost code or by another wrap.

    Another wrap has then been named already.
    """
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
    """The code objects of the functions that ``bind`` and ``bind_owned`` make."""
    nothing = OwnedWrap(_codes, Owner("", "", "", ""), "")
    return frozenset(c for f in (bind(_codes, _codes), bind_owned(nothing, _codes, None, False)) if (c := code_of(f)))


BOUND = _codes()
