"""Make a plan from keyword arguments, and show a progress bar in notebooks."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from xdit_core.checkpoints.hub import AUTO
from xdit_core.errors import UsageError
from xdit_core.observe.observer import Observer
from xdit_core.plan import Plan
from xdit_core.planning.planner import make_plan
from xdit_core.registry.registry import MODELS, Registry
from xdit_core.settings import lora_texts


def plan_from(
    model: str | os.PathLike[str],
    plugins: str | Iterable[str] = (),
    registry: Registry | None = None,
    world: int = 1,
    **settings: Any,
) -> Plan:
    """Make the plan of an engine.

    Args:
        model: the name of an installed model (``emoji``), or a folder or hub id of a diffusers pipeline; the adapter
            that fits it is used.
        plugins: names of strategies, as a list or as ``"usp,pipefusion"``.
        registry: where plugins come from; by default the installed ones.
        world: number of processes.
        settings: as on the command line; those of a plugin as a mapping: ``usp={"ulysses": 2}``; further arguments of
            the pipeline as ``call={...}``; LoRAs also as ``lora={PATH: 0.8}``.

    Raises:
        UsageError: several processes were started and do not know of each other; and as of ``make_plan``.
        ModelError, PlanRefused: as of ``make_plan``.
    """
    registry = registry or Registry()
    text = os.fspath(model)
    values: dict[str, Any] = {"model": text}
    if text not in registry.names(MODELS) and (os.sep in text or os.path.isdir(text)):
        values = {"model": AUTO.name, "model.path": text}
    for key, value in settings.items():
        if key == "lora" and value is not None:
            values[key] = lora_texts(value)
            continue
        nested = (
            {f"{key}.{name}": inner for name, inner in value.items()} if isinstance(value, Mapping) else {key: value}
        )
        values |= {name: inner for name, inner in nested.items() if inner is not None}
    if "nproc" not in values:
        refuse_apart(world)
        values["nproc"] = world
    return make_plan(names_of(plugins), values, registry)


def refuse_apart(world: int) -> None:
    """Refuse processes that were started together, as by torchrun, and have not joined a process group.

    Each of them would silently draw the whole picture by itself.

    Args:
        world: ranks of the process group, 1 if there is none.

    Raises:
        UsageError: the environment says that there are several processes.
    """
    import torch.distributed as dist

    started = os.environ.get("WORLD_SIZE", "1")
    if world == 1 and started not in ("", "0", "1") and not (dist.is_available() and dist.is_initialized()):
        raise UsageError(
            f"WORLD_SIZE={started} says that this is one of {started} processes, but they have joined no process "
            "group, so that each would draw everything by itself; call torch.distributed.init_process_group() first, "
            "or give nproc=1 if that is what you want."
        )


def names_of(plugins: str | Iterable[str]) -> list[str]:
    """Return the names of plugins, from a list or from one text."""
    return [name.strip() for name in plugins.split(",") if name.strip()] if isinstance(plugins, str) else list(plugins)


class Bar(Observer):
    """A progress bar of ``tqdm``, which looks right in a notebook and in a terminal."""

    def __init__(self) -> None:
        self._bar: Any = None

    def step_done(self, step: int, steps: int) -> None:
        """Move the bar; the first step of a picture begins a new one."""
        from tqdm.auto import tqdm  # type: ignore[import-untyped]

        if self._bar is None or step <= self._bar.n:
            self.close()
            self._bar = tqdm(total=steps, disable=False)
        self._bar.update(step - self._bar.n)
        if step >= steps:
            self.close()

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class StepFunction(Observer):
    """Calls a function of the user after each step.

    Args:
        function: called with the number of the step, counted from 1, and how many there are.
    """

    def __init__(self, function: Callable[[int, int], None]) -> None:
        self._function = function

    def step_done(self, step: int, steps: int) -> None:
        """Call the function."""
        self._function(step, steps)


def steps_observer(progress: Callable[[int, int], None] | bool | None, rank: int) -> Observer | None:
    """The observer that shows the steps to the user of an engine.

    Args:
        progress: a function to call, True for a bar, None for a bar in a notebook only.
        rank: this rank; only the first one has a bar.
    """
    if callable(progress):
        return StepFunction(progress)
    wanted = "ipykernel" in sys.modules if progress is None else progress
    return Bar() if wanted and rank == 0 else None
