"""Nest wraps once, at set-up; afterwards there are only plain calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


def nest(wraps: Sequence[Callable[..., Any]], base: Callable[..., Any]) -> Callable[..., Any]:
    """``base`` inside the wraps ``f(inner, *args)``, the first of them outermost."""
    for wrap in reversed(wraps):
        base = bind(wrap, base)
    return base


def bind(wrap: Callable[..., Any], inner: Callable[..., Any]) -> Callable[..., Any]:
    """``wrap`` with its inner bound."""

    def bound(*args: Any, **kwargs: Any) -> Any:
        return wrap(inner, *args, **kwargs)

    return bound
