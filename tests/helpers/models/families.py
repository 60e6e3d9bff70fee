"""What the parity tests know of each model: our settings, and the same request in the words of its diffusers
pipeline."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

STEPS = 3


@dataclass(frozen=True)
class Family:
    """One model, or one kind of a model.

    Args:
        model: name of the adapter; that of the function that makes the tiny pipeline as well.
        ours: settings.
        theirs: arguments of the pipeline's ``__call__``.
        options: of the tiny pipeline.
        guided: what to add, ours and theirs, for a run with guidance if it is not there; None where it is.
        plain: what to change for a run without guidance; None if there is none.
        scheduler: another one than the model's.
        patches: of the displaced runs.
        subject: what to draw.
        strategies: those that its architecture allows.
        brief: a few combinations do: a near relative, or `tests/combos`, runs the others.
    """

    model: str
    ours: Mapping[str, Any]
    theirs: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    plain: tuple[Mapping[str, Any], Mapping[str, Any]] | None = None
    scheduler: str = ""
    patches: int = 3
    subject: str = "a red fox"
    brief: bool = False
    strategies: tuple[str, ...] = (
        *("usp", "tp", "dp", "cfg", "pipefusion", "distrifusion", "parallel_vae", "compile", "flash"),
    )


def size(height: int, width: int) -> dict[str, int]:
    """The same words in both."""
    return {"height": height, "width": width}


NO_GUIDANCE = ({"guidance": 1.0}, {"guidance_scale": 1.0})
PROMPT = {"prompt": "a red fox", "num_images_per_prompt": 2}
OWN_SIZE = {"use_resolution_binning": False}

FAMILIES: dict[str, Family] = {
    "sd3": Family(
        "sd3",
        {**size(24, 40), "guidance": 7.0, "max_sequence_length": 5},
        {**PROMPT, **size(24, 40), "guidance_scale": 7.0, "max_sequence_length": 5},
        plain=NO_GUIDANCE,
        scheduler="FlowMatchHeunDiscreteScheduler",
        brief=True,
    ),
    "pixart_alpha": Family(
        "pixart_alpha",
        {**size(24, 40), "guidance": 4.5, "call.use_resolution_binning": False, "call.clean_caption": False},
        {**PROMPT, **size(24, 40), "guidance_scale": 4.5, **OWN_SIZE, "clean_caption": False},
        plain=NO_GUIDANCE,
        scheduler="DDIMScheduler",
        brief=True,
    ),
    "pixart_sigma": Family(
        "pixart_sigma",
        {**size(24, 40), "guidance": 4.5, "call.use_resolution_binning": False, "call.clean_caption": False},
        {**PROMPT, **size(24, 40), "guidance_scale": 4.5, **OWN_SIZE, "clean_caption": False},
        plain=NO_GUIDANCE,
        scheduler="EulerDiscreteScheduler",
        brief=True,
    ),
    "flux": Family(
        "flux",
        {**size(24, 40), "guidance": 3.5, "negative": "blue", "max_sequence_length": 7, "call.true_cfg_scale": 4.0},
        {
            **{**PROMPT, **size(24, 40), "guidance_scale": 3.5, "negative_prompt": "blue"},
            **{"true_cfg_scale": 4.0, "max_sequence_length": 7},
        },
        plain=({"negative": None}, {"negative_prompt": None}),
        scheduler="FlowMatchLCMScheduler",
    ),
    "hunyuandit": Family(
        "hunyuandit",
        {**size(96, 160), "guidance": 5.0, "call.use_resolution_binning": False},
        {**PROMPT, **size(96, 160), "guidance_scale": 5.0, **OWN_SIZE},
        plain=NO_GUIDANCE,
        scheduler="DPMSolverMultistepScheduler",
    ),
    "dit": Family(
        "dit",
        {"guidance": 4.0},
        {"class_labels": [207, 207], "guidance_scale": 4.0},
        plain=NO_GUIDANCE,
        scheduler="DPMSolverMultistepScheduler",
        subject="golden retriever",
    ),
    "latte": Family(
        "latte",
        {**size(24, 40), "frames": 4, "guidance": 4.0, "call.clean_caption": False},
        {"prompt": "a red fox", **size(24, 40), "video_length": 4, "guidance_scale": 4.0, "clean_caption": False},
        plain=NO_GUIDANCE,
        scheduler="EulerDiscreteScheduler",
    ),
    "cogvideox-2b": Family(
        "cogvideox",
        {**size(24, 40), "frames": 5, "guidance": 6.0, "max_sequence_length": 8},
        {"prompt": "a red fox", **size(24, 40), "num_frames": 5, "guidance_scale": 6.0, "max_sequence_length": 8},
        options={"kind": "2b"},
        plain=NO_GUIDANCE,
        scheduler="CogVideoXDPMScheduler",
    ),
    "cogvideox-5b": Family(
        "cogvideox",
        {**size(24, 40), "frames": 5, "guidance": 6.0, "max_sequence_length": 7},
        {"prompt": "a red fox", **size(24, 40), "num_frames": 5, "guidance_scale": 6.0, "max_sequence_length": 7},
        options={"kind": "5b"},
        plain=NO_GUIDANCE,
        scheduler="CogVideoXDDIMScheduler",
        brief=True,
    ),
    "cogvideox-1.5": Family(
        "cogvideox",
        {**size(24, 40), "frames": 5, "guidance": 6.0, "max_sequence_length": 7},
        {"prompt": "a red fox", **size(24, 40), "num_frames": 5, "guidance_scale": 6.0, "max_sequence_length": 7},
        options={"kind": "1.5"},
        plain=NO_GUIDANCE,
        scheduler="CogVideoXDDIMScheduler",
    ),
    "wan-2.1": Family(
        "wan",
        {**size(32, 48), "frames": 5, "guidance": 5.0, "max_sequence_length": 7},
        {
            **{"prompt": "a red fox", "num_videos_per_prompt": 2, **size(32, 48), "num_frames": 5},
            **{"guidance_scale": 5.0, "max_sequence_length": 7},
        },
        plain=NO_GUIDANCE,
        scheduler="FlowMatchEulerDiscreteScheduler",
    ),
    "wan-2.2": Family(
        "wan",
        {**size(32, 48), "frames": 5, "guidance": 5.0, "max_sequence_length": 7, "call.guidance_scale_2": 3.0},
        {
            **{"prompt": "a red fox", "num_videos_per_prompt": 2, **size(32, 48), "num_frames": 5},
            **{"guidance_scale": 5.0, "guidance_scale_2": 3.0, "max_sequence_length": 7},
        },
        options={"kind": "2.2"},
        scheduler="FlowMatchEulerDiscreteScheduler",
    ),
    "wan-5b": Family(
        "wan",
        {**size(32, 48), "frames": 5, "guidance": 5.0, "max_sequence_length": 7},
        {
            **{"prompt": "a red fox", "num_videos_per_prompt": 2, **size(32, 48), "num_frames": 5},
            **{"guidance_scale": 5.0, "max_sequence_length": 7},
        },
        options={"kind": "5b"},
        plain=NO_GUIDANCE,
        scheduler="FlowMatchEulerDiscreteScheduler",
        brief=True,
    ),
    "qwen_image": Family(
        "qwen_image",
        {**size(24, 40), "guidance": 4.0, "negative": "blue", "max_sequence_length": 40},
        {**PROMPT, **size(24, 40), "true_cfg_scale": 4.0, "negative_prompt": "blue", "max_sequence_length": 40},
        plain=({"guidance": 1.0}, {"true_cfg_scale": 1.0}),
        scheduler="FlowMatchLCMScheduler",
    ),
    "z_image": Family(
        "z_image",
        {**size(24, 40), "guidance": 1.5, "negative": "blue", "max_sequence_length": 40},
        {**PROMPT, **size(24, 40), "guidance_scale": 1.5, "negative_prompt": "blue", "max_sequence_length": 40},
        plain=({"guidance": 0.0}, {"guidance_scale": 0.0}),
        scheduler="FlowMatchLCMScheduler",
    ),
    "z_image-masked": Family(  # texts of 64 and 32 rows in one batch, so with a mask
        "z_image",
        {**size(24, 40), "guidance": 1.5, "negative": "blue", "max_sequence_length": 60},
        {
            **{"prompt": "a red fox in the snow", "num_images_per_prompt": 2, **size(24, 40), "guidance_scale": 1.5},
            **{"negative_prompt": "blue", "max_sequence_length": 60},
        },
        scheduler="FlowMatchLCMScheduler",
        subject="a red fox in the snow",
        brief=True,
    ),
    "sdxl": Family(
        "sdxl",
        {**size(32, 48), "guidance": 5.0},
        {**PROMPT, **size(32, 48), "guidance_scale": 5.0},
        plain=NO_GUIDANCE,
        scheduler="DPMSolverMultistepScheduler",
        strategies=("dp", "cfg", "parallel_vae", "compile", "distrifusion"),
    ),
}


def settings(family: Family, **more: Any) -> dict[str, Any]:
    """Ours."""
    base = {"model": family.model, "steps": STEPS, "images": 2, "output_type": "latent", "device": "cpu"}
    base["max_sequence_length"] = None
    return {**base, **family.ours, **more}


def serial(folder: str, arguments: Mapping[str, Any], scheduler: str = "", images: int = 2) -> torch.Tensor:
    """Latents of the unmodified pipeline, called as a user of diffusers would; where it gives none, what its VAE is
    given."""
    import diffusers

    index = json.loads((Path(folder) / "model_index.json").read_text())
    absent = {name: None for name, entry in index.items() if isinstance(entry, list) and entry[0] is None}
    pipe = getattr(diffusers, index["_class_name"]).from_pretrained(folder, **absent)
    pipe.set_progress_bar_config(disable=True)
    if scheduler:
        pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    given: list[torch.Tensor] = []
    if index["_class_name"] == "DiTPipeline":
        decode = pipe.vae.decode
        pipe.vae.decode = lambda latents: (given.append(latents), decode(latents))[1]

    def call(generator: Any, seed: int = 0) -> torch.Tensor:
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            found = pipe(**arguments, num_inference_steps=STEPS, generator=generator, output_type="latent")
        return given[-1] if given else found[0]

    generators = [torch.Generator().manual_seed(i) for i in range(images)]
    if scheduler == "FlowMatchLCMScheduler":  # it draws from the default generator: each picture alone
        arguments = {**arguments, "num_images_per_prompt": 1}
        return torch.cat([call([g], seed) for seed, g in enumerate(generators)])
    if index["_class_name"] in ("CogVideoXPipeline", "LattePipeline"):  # one video a call, see the adapters
        return torch.cat([call([g]) for g in generators])
    return call(generators)
