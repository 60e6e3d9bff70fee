"""One rank of many in this process, and what a step of it launches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

COLLECTIVES = ("c10d::", "_c10d_functional::")


class Count(TorchDispatchMode):
    """Counts operations by name; views launch nothing and are left out."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not getattr(func, "is_view", False) and func.namespace != "prim":
            self.operations[f"{func.namespace}::{func.overloadpacket.__name__}"] += 1
        return func(*args, **(kwargs or {}))


def operations(request: Callable[[int], Any]) -> Counter[str]:
    """Of one step of a request of some steps."""
    counts = []
    for steps in (4, 3):
        with Count() as count:
            request(steps)
        counts.append(count.operations)
    return counts[0] - counts[1]


def collectives(counted: Counter[str]) -> int:
    """How many of the operations are collectives or messages."""
    return sum(n for name, n in counted.items() if name.startswith(COLLECTIVES))


def one_rank(
    plugins: list[str], settings: dict[str, Any], world: int, rank: int, stack: ExitStack
) -> Callable[[int], Any]:
    """Requests of some steps to one rank of a world that is not there."""
    from xdit_core import Engine, make_plan
    from xdit_core.testing.world import fake_world

    if world > 1:
        stack.enter_context(fake_world(world, rank))
    engine = Engine(make_plan(plugins, {"device": "cpu", "output_type": "latent", **settings}))
    stack.callback(engine.close)
    # what collectives leave as it was would be seen as numbers gone wrong; a one launches as much as nothing does
    stack.enter_context(mock.patch.object(torch.Tensor, "new_empty", torch.Tensor.new_ones))
    stack.enter_context(mock.patch.object(torch, "empty_like", torch.ones_like))
    empty = torch.empty

    def filled(*shape: Any, **options: Any) -> torch.Tensor:
        made = empty(*shape, **options)
        return made if made.is_meta or not made.numel() else made.fill_(1)

    stack.enter_context(mock.patch.object(torch, "empty", filled))
    return lambda steps: engine.generate("a red fox", steps=steps)
