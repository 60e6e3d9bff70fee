"""What ComfyUI gives a denoiser, as arguments of the same denoiser in diffusers, and its prediction back.

Shapes: ``B`` batch, ``C`` channels, ``h`` and ``w`` rows and columns of latents, ``f`` frames of latents, ``t`` tokens
of text, ``D`` width of the text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F

Tensors = dict[str, torch.Tensor]
Grid = tuple[int, int]
SIDE = 2  # latent elements a side of a token


def padded(x: torch.Tensor) -> torch.Tensor:
    """Latents whose rows and columns are whole tokens; added ones are those of the other edge."""
    rows, columns = -x.shape[-2] % SIDE, -x.shape[-1] % SIDE
    if not (rows or columns):
        return x
    flat = F.pad(x.flatten(0, -4) if x.dim() > 4 else x, (0, columns, 0, rows), mode="circular")
    return flat.reshape(*x.shape[:-2], *flat.shape[-2:])


def flux(
    x: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor, conditions: Mapping[str, torch.Tensor]
) -> tuple[Tensors, Grid]:
    """Arguments of ``FluxTransformer2DModel``: latents are packed into tokens.

    Args:
        x: ``[B, C, h, w]``.
        timestep: ``[B]``, from 0 to 1.
        context: ``[B, t, D]``.
        conditions: ``y``, the pooled text, and ``guidance``.

    Returns:
        The arguments, and rows and columns of tokens.
    """
    x = padded(x)
    batch, channels, height, width = x.shape
    rows, columns = height // SIDE, width // SIDE
    tokens = x.reshape(batch, channels, rows, SIDE, columns, SIDE).permute(0, 2, 4, 1, 3, 5)
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1], ids[..., 2] = torch.arange(rows)[:, None], torch.arange(columns)
    arguments = {
        "hidden_states": tokens.reshape(batch, rows * columns, channels * SIDE * SIDE),
        "encoder_hidden_states": context,
        "pooled_projections": conditions["y"],
        "timestep": timestep.to(x.dtype),
        "img_ids": ids.reshape(-1, 3).to(x.dtype),
        "txt_ids": torch.zeros(context.shape[1], 3, dtype=x.dtype),
    }
    if conditions.get("guidance") is not None:
        arguments["guidance"] = conditions["guidance"].float().expand(batch)
    return arguments, (rows, columns)


def from_flux(prediction: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The prediction of Flux, ``[B, rows x columns, C x 4]``, in the shape of the latents."""
    batch, channels, height, width = like.shape
    rows, columns = -(-height // SIDE), -(-width // SIDE)
    whole = prediction.reshape(batch, rows, columns, channels, SIDE, SIDE).permute(0, 3, 1, 4, 2, 5)
    return whole.reshape(batch, channels, rows * SIDE, columns * SIDE)[..., :height, :width]


def wan(
    x: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor, conditions: Mapping[str, torch.Tensor]
) -> tuple[Tensors, Grid]:
    """Arguments of ``WanTransformer3DModel``.

    Args:
        x: ``[B, C, f, h, w]``.
        timestep: ``[B]``, from 0 to 1000.
        context: ``[B, t, D]``.
        conditions: none are known.
    """
    x = padded(x)
    arguments = {"hidden_states": x, "timestep": timestep.float(), "encoder_hidden_states": context}
    return arguments, (x.shape[-2] // SIDE, x.shape[-1] // SIDE)


def from_wan(prediction: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The prediction of Wan in the shape of the latents."""
    return prediction[..., : like.shape[-2], : like.shape[-1]]


To = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Mapping[str, torch.Tensor]], tuple[Tensors, Grid]]
From = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
FAMILIES: Mapping[str, tuple[To, From, tuple[str, ...]]] = MappingProxyType(
    {"flux": (flux, from_flux, ("y", "guidance")), "wan": (wan, from_wan, ())}
)
