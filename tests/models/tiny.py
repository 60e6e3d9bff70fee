"""Tiny pipelines with random weights, from the real diffusers classes; one function for each model, by the adapter's name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextModel

from xdit_core.testing.models import clip_tokenizer, tiny_clip, tiny_t5, tiny_vae

WORDS = ["a", "red", "fox", "in", "the", "snow"]


def shaken(module: Any) -> Any:
    """Defaults start some layers at zero, which would hide errors."""
    for p in module.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.15)
    return module.eval()


def flux(dev: bool = True) -> FluxPipeline:
    """2 double and 3 single blocks, 4 heads x 8; packed latents."""
    clip = clip_tokenizer([" ".join(WORDS)], length=12, vocab_size=600)
    t5, tokenizer = tiny_t5(16, WORDS)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        guidance_embeds=dev,
        axes_dims_rope=(2, 2, 4),
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=dev),
        vae=tiny_vae(16),
        text_encoder=tiny_clip(clip, 12, CLIPTextModel),
        tokenizer=clip,
        text_encoder_2=t5,
        tokenizer_2=tokenizer,
        transformer=shaken(transformer),
    )


def saved(name: str, folder: Path, **options: Any) -> str:
    """A tiny pipeline on disk."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        globals()[name](**options).save_pretrained(folder)
    return str(folder)
