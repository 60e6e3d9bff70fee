"""Stable Diffusion XL (Podell et al. 2023, arXiv:2307.01952): a U-Net, so without a list of blocks."""

from __future__ import annotations

from xdit_core import ModelSpec, hookimpl
from xdit_core.model_spec import Checkpoint, Latents, RequestSpec


@hookimpl
def xdit_model() -> ModelSpec:
    """The adapter."""
    return ModelSpec(
        name="sdxl",
        checkpoint=Checkpoint(
            pipelines=("StableDiffusionXLPipeline",), hub="stabilityai/stable-diffusion-xl-base-1.0", denoiser="unet"
        ),
        latents=Latents(
            argument="sample",
            patch_size="",
            row_unit=lambda config: int(2 ** (len(config["block_out_channels"]) - 1)),  # each level halves the sides
        ),
        request=RequestSpec(
            defaults={"steps": 50, "guidance": 5.0},
            example="an astronaut in a jungle, cold color palette, muted colors",
            not_taken=("max_sequence_length",),
        ),
    )
