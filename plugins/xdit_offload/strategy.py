"""Keeps weights on the CPU and moves them to the device when they are needed, by the hooks of diffusers.

The hooks are set last, so that they surround the forward that the wraps of other strategies are in.
"""

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
