"""Stable Diffusion XL (Podell et al. 2023, arXiv:2307.01952): a U-Net, so no list of blocks."""

from __future__ import annotations

from xdit_core import ModelSpec, hookimpl


@hookimpl
def xdit_model() -> ModelSpec:
    """The adapter."""
    return ModelSpec(
        name="sdxl",
        pipelines=("StableDiffusionXLPipeline",),
        hub="stabilityai/stable-diffusion-xl-base-1.0",
        denoiser="unet",
        latents="sample",
        heads="",
        patch="",
        row_unit=lambda config: int(2 ** (len(config["block_out_channels"]) - 1)),  # each level halves the sides
        defaults={
            "steps": 50,
            "guidance": 5.0,
            "prompt": ("an astronaut in a jungle, cold color palette, muted colors",),
        },
        call={"max_sequence_length": ""},
    )
