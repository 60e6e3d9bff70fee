"""Cells, the futures that patch tensors are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, cast

import torch


class LazyValue:
    """One future: computed once, when first asked for; then it drops whatever it needed.

    Args:
        run: called with ``inputs``, cells among them replaced by their values; must not write to them.
    """

    __slots__ = ("_inputs", "_run", "_value")

    def __init__(self, run: Callable[..., torch.Tensor], *inputs: Any) -> None:
        self._run: Callable[..., torch.Tensor] | None = run
        self._inputs = inputs
        self._value: torch.Tensor | None = None

    def value(self) -> torch.Tensor:
        """The value, not to be written to. Chains may be of any length: there is no recursion."""
        if self._run is not None:
            # Autocast, if it was on, acted when the operation was recorded; that it may be on now has no say.
            with torch.no_grad(), torch._C._DisableAutocast():
                stack = [self]
                while stack:
                    cell = stack[-1]
                    waiting = [c for c in cell._inputs if isinstance(c, LazyValue) and c._run is not None]
                    if waiting:
                        stack.extend(reversed(waiting))
                        continue
                    if cell._run is not None:
                        cell._value = cell._run(*[c._value if isinstance(c, LazyValue) else c for c in cell._inputs])
                        cell._run, cell._inputs = None, ()
                    stack.pop()
        return cast(torch.Tensor, self._value)


class Placement(Protocol):
    """What a patch tensor must know about the ranks that hold its values; see ``PatchPlacement``."""

    @property
    def evaluates(self) -> bool:
        """False on ranks that never have values."""

    def materialize(self, tensor: Any) -> torch.Tensor:
        """The whole value of a patch tensor."""

    def report(self, op: str) -> None:
        """An operation is about to materialize a patch tensor."""
