"""Show the latents while a run goes on, without making ranks wait."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from xdit_core.parallel.placements import evaluated


class Preview:
    """A ``callback_on_step_end`` that shows the latents of the step before, on the ranks that have them.

    Under PipeFusion the latents of a step arrive while the next step is computed, so those of the step before are
    complete. A callback that reads ``latents`` itself gathers them on all ranks; this is correct, but all ranks wait.

    Args:
        show: a function of the index of a step and its latents ``[B, C, h, w]``, a plain tensor.

    Example::

        engine.generate("rocket", call={"callback_on_step_end": Preview(lambda step, latents: print(step,
        latents.std()))})
    """

    def __init__(self, show: Callable[[int, torch.Tensor], None]) -> None:
        self.show, self._last = show, None

    def __call__(self, pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        """Show the latents; the pipeline calls this after each step."""
        last = evaluated(self._last)
        if last is not None and step > 0:
            self.show(step - 1, last)
        self._last = values["latents"]
        return values
