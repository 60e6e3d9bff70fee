"""Small pictures of latents, from a linear map that is fitted to what the VAE has decoded.

The colours of a square of the picture are nearly a linear function of the latent pixel that stands for it. So each
finished picture is compared with its latents, by least squares, and the map is applied to the latents of later steps.
It needs no network and no knowledge of the VAE: where a pipeline packs several latent pixels into one token, a token
stands for a larger square.
"""

from __future__ import annotations

from typing import Any

import torch

RIDGE = 1e-3  # of the mean square of the latents, so that few samples make no wild map


class PreviewMap:
    """A linear map from latents to colours, fitted to all pictures that it was shown.

    Args:
        frame_dim: dim along which the latents of a video ``[B, ...]`` have their frames, None for pictures.
    """

    def __init__(self, frame_dim: int | None = None) -> None:
        self._frame_dim = frame_dim
        self._products: torch.Tensor | None = None  # X'X and X'Y of the least squares, side by side
        self._map: torch.Tensor | None = None

    def learn(self, latents: torch.Tensor, picture: Any, grid: tuple[int, int]) -> None:
        """Take a finished picture into account.

        Args:
            latents: of one picture: ``[C, h, w]``, ``[C, F, h, w]`` of a video, or ``[n, C]`` in tokens.
            picture: the PIL picture, or the first frame of the video.
            grid: rows and columns of tokens, for latents in tokens.
        """
        import numpy as np

        x = self._columns(latents, grid)
        h, w = x.shape[:2]
        small = np.asarray(picture.convert("RGB").resize((w, h), resample=BOX), dtype=np.float32) / 255
        features = with_one(x.reshape(h * w, -1))
        products = torch.cat((features.T @ features, features.T @ torch.from_numpy(small).reshape(h * w, 3)), 1)
        if self._products is not None and self._products.shape == products.shape:
            products = self._products + products
        self._products = products
        size = products.shape[0]
        square = products[:, :size]
        regular = square + RIDGE * square.diagonal().mean() * torch.eye(size)
        self._map = torch.linalg.solve(regular, products[:, size:])

    def picture(self, latents: torch.Tensor, grid: tuple[int, int]) -> Any:
        """A PIL picture of the size of the latents; None before the first picture was learnt.

        Args:
            latents, grid: as of `learn`.
        """
        if self._map is None:
            return None
        from PIL import Image

        x = self._columns(latents, grid)
        h, w = x.shape[:2]
        features = with_one(x.reshape(h * w, -1))
        if features.shape[1] != self._map.shape[0]:
            return None
        colours = (features @ self._map).clamp(0, 1).mul(255).round().to(torch.uint8)
        return Image.fromarray(colours.reshape(h, w, 3).numpy(), "RGB")

    def _columns(self, latents: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """The latents of one picture, or of the first frame of a video, as ``[h, w, C]`` in float32 on the CPU."""
        if latents.dim() == 2:
            return latents.reshape(*grid, -1).float().cpu()
        if latents.dim() == 4 and self._frame_dim is not None:
            latents = latents.select(self._frame_dim - 1, 0)
        return latents.permute(1, 2, 0).float().cpu()


BOX = 4  # PIL's box filter: the mean of all pixels that a small one covers


def with_one(features: torch.Tensor) -> torch.Tensor:
    """Add a column of ones, for the constant of the map."""
    return torch.cat((features, torch.ones(len(features), 1)), 1)


def denoised(latents: torch.Tensor, before: torch.Tensor | None, sigmas: Any, step: int) -> torch.Tensor:
    """An estimate of the latents without their noise, from those behind two steps.

    With ``x = (1 - s) x0 + s n`` or ``x = x0 + s n``, the slope ``dx/ds`` of an Euler step leads back to ``x0`` at
    ``s = 0``.

    Args:
        latents: behind this step.
        before: behind the step before, None at the first.
        sigmas: noise levels of the scheduler, None if it has none; ``sigmas[step]`` is that behind the step.
        step: counted from 1.

    Returns:
        ``latents`` themselves where there is no estimate.
    """
    if before is None or sigmas is None or step >= len(sigmas) or before.shape != latents.shape:
        return latents
    now, then = float(sigmas[step]), float(sigmas[step - 1])
    return latents if now == then else latents - now * (latents - before) / (now - then)
