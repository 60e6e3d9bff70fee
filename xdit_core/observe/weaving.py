"""How observers come into the chains of wraps and between the blocks: when the engine is built, and not at all where
nobody watches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from xdit_core.observe.observer import Around, Observer


def watched(function: Callable[..., Any], around: Around | None) -> Callable[..., Any]:
    """The function, each call in the context of whoever watches it; the function itself if nobody does.

    Where a compiler follows the call nothing is seen.
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
    """The wrap that looks at another wrap, or at the model's own code; none if nobody wants to see it."""
    around = observer.point(point, level, plugin)
    if around is None:
        return []

    def seen(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with around():
            return inner(*args, **kwargs)

    return [seen]
