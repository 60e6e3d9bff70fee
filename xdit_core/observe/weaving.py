"""Put observers around wraps and blocks when the engine is built. What nobody observes stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from xdit_core.observe.observer import Around, Observer


def watched(function: Callable[..., Any], around: Around | None) -> Callable[..., Any]:
    """The function with a context around each call, or the function itself if nobody observes it.

    While a compiler traces the call, the context is left out.
    """
    if around is None:
        return function

    def seen(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        with around():
            return function(*args, **kwargs)

    return seen


def watching(observer: Observer, point: str, level: str = "", plugin: str = "") -> list[Callable[..., Any]]:
    """A list with the wrap that observes another wrap or the model's own code; empty if nobody does."""
    around = observer.point(point, level, plugin)
    if around is None:
        return []

    def seen(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with around():
            return inner(*args, **kwargs)

    return [seen]
