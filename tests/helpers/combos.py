"""What the combination tests share: settings of each strategy on a tiny model, and the comparison with its oracle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from xdit_core import Engine, Plan, Registry
from xdit_core.registry.registry import STRATEGIES
from xdit_core.testing import oracle_of
from xdit_core.testing.runs import plan_for

# What a strategy is given in a combination; two ranks for each axis, so a pair has up to 4 ranks and a triple up to 8.
SETTINGS: dict[str, dict[str, Any]] = {
    "cfg": {},
    "compile": {"compile.backend": "eager"},
    "distrifusion": {"distrifusion.degree": 2},
    "dp": {"dp.degree": 2},
    "flash": {"flash.kernel": "math"},
    "offload": {},
    "parallel_vae": {},
    "pipefusion": {"pipefusion.stages": 2, "pipefusion.patches": 3},
    "tp": {"tp.degree": 2},
    "usp": {"usp.ulysses": 2, "usp.ring": 1},
}
OWN = {"use_resolution_binning": False, "clean_caption": False}
MODELS: dict[str, dict[str, Any]] = {
    "sd3": {"model": "sd3"},
    "pixart_sigma": {"model": "pixart_sigma", **{f"call.{k}": v for k, v in OWN.items()}},
}
COMMON = {"images": 2, "steps": 3, "height": 24, "width": 40}


def strategies() -> list[str]:
    """The strategies that this distribution brings."""
    return sorted(name for name, found in Registry().installed(STRATEGIES).items() if found[0].distribution == "xdit")


def settings(names: Sequence[str], model: str, **more: Any) -> dict[str, Any]:
    """Settings of a combination."""
    return {**MODELS[model], **COMMON, **{k: v for n in names for k, v in SETTINGS[n].items()}, **more}


def drawn(names: Sequence[str], folder: str, values: Mapping[str, Any]) -> tuple[torch.Tensor | None, list[Any] | None]:
    """On every rank: the latents, or the pictures where there are any."""
    torch.set_num_threads(1)
    engine = Engine(plan_for(names, folder, values))
    try:
        output = engine.generate("a red fox")
        return output.latents, output.images
    finally:
        engine.close()


def oracle(plan: Plan, folder: str, model: str) -> torch.Tensor:
    """The latents that a plan must give, also where it is for pictures."""
    named = ("guidance", "images", "steps", "height", "width", "max_sequence_length")
    asked = {name: getattr(plan.run, name) for name in named}
    return oracle_of(plan, folder, {**MODELS[model], **COMMON, **asked, "output_type": "latent"})


def decoded(folder: str, latents: torch.Tensor) -> list[Any]:
    """Pictures of latents, by the unmodified VAE and image processor."""
    import diffusers
    from diffusers.image_processor import VaeImageProcessor

    vae = diffusers.AutoencoderKL.from_pretrained(Path(folder) / "vae")
    with torch.no_grad():
        picture = vae.decode(latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0), return_dict=False)[
            0
        ]
    return VaeImageProcessor(vae_scale_factor=2).postprocess(picture)
