"""A spatial and a temporal block of Latte as one block; the denoiser's loop does the same with tensors of all
tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Pair(nn.Module):
    """Attention over the tokens of each frame, then over the frames at each place.

    Args:
        spatial, temporal: the two blocks.
        positions: ``[1, frames, D]``, added before the first temporal block, else None.
    """

    def __init__(self, spatial: nn.Module, temporal: nn.Module, positions: torch.Tensor | None) -> None:
        super().__init__()
        self.spatial, self.temporal = spatial, temporal
        self.positions: torch.Tensor | None
        self.register_buffer("positions", positions, persistent=False)

    def forward(self, hidden_states: torch.Tensor, frames: int, timestep: torch.Tensor, **rest: Any) -> torch.Tensor:
        """Both blocks.

        Args:
            hidden_states: ``[B x frames, n, D]``.
            frames: of each video.
            timestep: modulation ``[B x frames, 6 D]``, the same for all frames of a video.
            rest: the other arguments of the spatial block.

        Returns:
            ``[B x frames, n, D]``.
        """
        x: torch.Tensor = self.spatial(hidden_states, timestep=timestep, **rest)
        n = x.shape[1]
        x = x.unflatten(0, (-1, frames)).transpose(1, 2).flatten(0, 1)  # type: ignore[no-untyped-call]
        if self.positions is not None and frames > 1:
            x = x + self.positions.to(x.dtype)
        x = self.temporal(x, timestep=timestep[::frames].repeat_interleave(n, dim=0))
        x = x.unflatten(0, (-1, n)).transpose(1, 2).flatten(0, 1)  # type: ignore[no-untyped-call]
        return x
