"""CPU offload by diffusers' own hooks, on the pipeline with the strategies woven in."""

from __future__ import annotations

from typing import Any

import torch


class Offload:
    """Puts the hooks on.

    Args:
        mode: ``model`` or ``sequential``.
        device: where the work is done.
    """

    def __init__(self, mode: str, device: torch.device) -> None:
        self.mode, self.device = mode, device

    def __call__(self, pipe: Any) -> None:
        """The components stay on the CPU from here on, and come to the device for as long as they work."""
        enable = pipe.enable_sequential_cpu_offload if self.mode == "sequential" else pipe.enable_model_cpu_offload
        enable(device=self.device)
