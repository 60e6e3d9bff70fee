"""Leaves out what a block does to text where there are no text rows, as for all patches but the first.

On no rows, a module of the text stream launches as many operations as on a thousand. Which modules these are is seen
when a block first runs without text rows: those whose input has none. What they return is remembered: tensors without
elements, and values that only meet such tensors, such as gates. That nothing else depends on these values is proved by
running the block with NaN in their place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from xdit_core.points.blocks.routing import Routing, unrouted

Returned = dict[nn.Module, Any]  # by module of the text stream


class Alone:
    """Attention among the rows in hand, for runs of which nothing but the dependence of values is looked at."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        """Torch's own attention."""
        return unrouted(q, k, v, **options)


class Forwards(AbstractContextManager[None]):
    """A context in which modules run other functions as their ``forward``; hooks run as ever."""

    def __init__(self, forwards: Mapping[nn.Module, Callable[..., Any]]) -> None:
        self._forwards = [(module.__dict__, forward) for module, forward in forwards.items()]
        self._before: list[Any] = []

    def __enter__(self) -> None:
        for attributes, forward in self._forwards:
            self._before.append(attributes.get("forward"))
            attributes["forward"] = forward

    def __exit__(self, *details: Any) -> None:
        for attributes, _ in reversed(self._forwards):
            before = self._before.pop()
            if before is None:
                del attributes["forward"]
            else:
                attributes["forward"] = before


class EmptyText:
    """The text streams of the blocks of a trunk, for calls without text rows."""

    def __init__(self) -> None:
        self._known: dict[Any, Forwards] = {}

    def left_out(self, key: Any, block: nn.Module, arguments: Mapping[str, Any]) -> Forwards:
        """A context to run a block in.

        Args:
            key: of the block and of the shape of its text.
            block: it must not be compiled.
            arguments: of its forward; its text has no rows.
        """
        if key not in self._known:
            self._known[key] = remembered(learn(block, arguments))
        return self._known[key]


def remembered(returned: Returned) -> Forwards:
    """Modules return what is remembered instead of running."""
    return Forwards({module: constant(value) for module, value in returned.items()})


class Learner:
    """Looks at the modules of a block while it runs without text rows."""

    def __init__(self, block: nn.Module) -> None:
        self.returned, self.calls = Returned(), Counter[nn.Module]()
        self.forwards = {m: partial(self.look, m, m.forward) for m in block.modules() if m is not block}
        self._inside = False

    def look(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a module; remember what it returns if it is given no rows and is not a part of such a module."""
        self.calls[module] += 1
        first = next((x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)), None)
        if self._inside or first is None or first.numel():
            return forward(*args, **kwargs)
        self._inside = True
        try:
            out = forward(*args, **kwargs)
        finally:
            self._inside = False
        self.returned[module] = tree_map_only(torch.Tensor, unknown, out)
        return out


def learn(block: nn.Module, arguments: Mapping[str, Any]) -> Returned:
    """What the modules of the text stream return for no rows, with NaN for all values."""
    learner = Learner(block)
    with Routing(Alone()):
        with Forwards(learner.forwards):
            whole = block(**arguments)
        returned = {module: value for module, value in learner.returned.items() if learner.calls[module] == 1}
        with remembered(returned):
            part = block(**arguments)
    same = all(torch.equal(a, b) for a, b in zip(tensors(whole), tensors(part), strict=True))
    if not same:  # gates and the like must be computed
        returned = {m: v for m, v in returned.items() if not any(x.numel() for x in tensors(v))}
    return returned


def tensors(value: Any) -> list[torch.Tensor]:
    """All tensors in a value."""
    return [x for x in tree_leaves(value) if isinstance(x, torch.Tensor)]


def unknown(x: torch.Tensor) -> torch.Tensor:
    """A tensor like another, all NaN."""
    return torch.full_like(x, torch.nan) if x.is_floating_point() else torch.empty_like(x)


def constant(value: Any) -> Any:
    """A function that returns a value, whatever it is given."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return value

    return forward
