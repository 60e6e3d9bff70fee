"""The parallel VAE: what the ranks of a picture decode together equals what one decodes alone."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from xdit_core import Axis, PlanRefused, Traffic, UsageError
from xdit_core.testing.runs import plan_for

# A tiny model of each class, the latents' channels and dims, and pixels a side of a latent element.
VAES = {
    "AutoencoderKL": (4, 4, 2),
    "AutoencoderKLTemporalDecoder": (4, 4, 2),
    "AutoencoderKLWan": (4, 5, 8),
    "AutoencoderKLQwenImage": (4, 5, 8),
    "AutoencoderKLFlux2": (4, 4, 2),
    "AutoencoderKLHunyuanVideo": (4, 5, 8),
    "AutoencoderKLCogVideoX": (4, 5, 8),
    "AutoencoderDC": (4, 4, 2),
}


def tiny(kind):
    """The same random VAE on every rank."""
    import diffusers

    blocks = {"block_out_channels": (8, 16), "layers_per_block": 1, "latent_channels": 4}
    two_d = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2, "norm_num_groups": 4}
    wan = {"base_dim": 8, "z_dim": 4, "dim_mult": (1, 2, 2, 2), "num_res_blocks": 1, "temperal_downsample": (False, True, True)}
    four = {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4}
    tiles = {"sample_size": 16}
    options = {
        "AutoencoderKL": {**blocks, **two_d, **tiles},
        "AutoencoderKLFlux2": {**blocks, **two_d, **tiles},
        "AutoencoderKLTemporalDecoder": {"block_out_channels": (32, 32), "layers_per_block": 1, "latent_channels": 4}
        | {"down_block_types": ("DownEncoderBlock2D",) * 2},
        "AutoencoderKLWan": {**wan, "latents_mean": (0.0,) * 4, "latents_std": (1.0,) * 4},
        "AutoencoderKLQwenImage": {**wan, "latents_mean": (0.0,) * 4, "latents_std": (1.0,) * 4},
        "AutoencoderKLHunyuanVideo": four,
        "AutoencoderKLCogVideoX": {**four, "sample_height": 64, "sample_width": 96, "temporal_compression_ratio": 4},
        "AutoencoderDC": {
            "latent_channels": 4,
            "attention_head_dim": 8,
            "encoder_block_types": ("ResBlock", "ResBlock"),
            "decoder_block_types": ("ResBlock", "ResBlock"),
            "encoder_block_out_channels": (8, 16),
            "decoder_block_out_channels": (8, 16),
            "encoder_layers_per_block": (1, 1),
            "decoder_layers_per_block": (1, 1),
            "encoder_qkv_multiscales": ((), ()),
            "decoder_qkv_multiscales": ((), ()),
        },
    }[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = getattr(diffusers, kind)(**options).eval()
        for p in vae.parameters():  # what the defaults set to zero or one would hide errors
            torch.nn.init.normal_(p, std=0.3 if p.dim() < 2 else p[0].numel() ** -0.5)
    if kind == "AutoencoderDC":
        vae.enable_tiling(12, 12, 8, 8)
        vae.disable_tiling()
    return vae


def inputs(kind, height, width, batch, frames=3):
    """Latents of that class, and the further arguments of ``decode``."""
    channels, dims, _ = VAES[kind]
    shape = (batch, channels, height, width) if dims == 4 else (batch, channels, frames, height, width)
    more = {"num_frames": batch} if kind == "AutoencoderKLTemporalDecoder" else {}
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)), more


@contextmanager
def divided(vae, settings=None, kinds=("x",), run=None):
    """The strategy around a VAE on the ranks of the current group; ``kinds``: names of the mesh axes, ``own`` makes other pictures."""
    import torch.distributed as dist

    from xdit_core import Mesh, Rank
    from xdit_parallel_vae.strategy import ParallelVae

    torch.set_num_threads(1)
    world = dist.get_world_size()
    axes = tuple(
        Axis(k, world // 2 if len(kinds) > 1 and i else 2 if len(kinds) > 1 else world, Traffic(i), own_outputs=k == "own")
        for i, k in enumerate(kinds)
    )
    run = SimpleNamespace(**{"height": None, "width": None, "output_type": "image", **(run or {})})
    rank = Rank(SimpleNamespace(axes=axes, run=run), None, Mesh(axes, "cpu"), torch.device("cpu"), torch.float32)
    strategy = ParallelVae((settings or {}).get("degree"), (settings or {}).get("tiling"), rank)
    strategy.prepare(SimpleNamespace(vae=vae))
    inner = vae.decode
    vae.decode = lambda *args, **kwargs: strategy.decode(inner, *args, **kwargs)
    with torch.no_grad():
        yield rank
    rank.mesh.close()


def decoded(kind, height, width, batch, settings=None, dtype=torch.float32, run=None):
    """On each rank: the sample, and the bytes sent."""
    vae = tiny(kind).to(dtype)
    latents, more = inputs(kind, height, width, batch)
    with divided(vae, settings, run=run) as rank:
        out = vae.decode(latents.to(dtype), return_dict=False, **more)
        return None if out is None else out[0], rank.sent["vae"]


def serial(kind, height, width, batch, dtype=torch.float32, tiled=False):
    vae = tiny(kind).to(dtype)
    if tiled:
        vae.enable_tiling()
    latents, more = inputs(kind, height, width, batch)
    with torch.no_grad():
        return vae.decode(latents.to(dtype), return_dict=False, **more)[0]
