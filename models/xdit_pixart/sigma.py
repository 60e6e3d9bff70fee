"""PixArt-Sigma."""

from __future__ import annotations

from xdit_core import ModelSpec, hookimpl
from xdit_pixart import spec


@hookimpl
def xdit_model() -> ModelSpec:
    """The adapter."""
    return spec("pixart_sigma", "PixArtSigmaPipeline", "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS")
