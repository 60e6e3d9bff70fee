"""The call of the pipeline: its arguments, and the scheduler that it uses."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from xdit_core.errors import PlanRefused, UsageError
from xdit_core.records import ModelSpec
from xdit_core.schedulers import check_scheduler
from xdit_core.settings import RunSettings, did_you_mean


def call_arguments(run: RunSettings, spec: ModelSpec, numbers: range) -> dict[str, Any]:
    """The shared settings as arguments of the pipeline's ``__call__``, for some of the pictures of a prompt."""
    named = {
        "steps": "num_inference_steps",
        "guidance": "guidance_scale",
        "negative": "negative_prompt",
        "height": "height",
        "width": "width",
        "frames": "num_frames",
        "max_sequence_length": "max_sequence_length",
        **spec.call,
    }
    images = spec.call.get("images", "num_images_per_prompt")
    pictures = {images: len(numbers)} if images else {}
    found = {word: value for key, word in named.items() if word and (value := getattr(run, key, None)) is not None}
    generators = [torch.Generator("cpu").manual_seed((run.seed + i) % 2**64) for i in numbers]
    latent = run.output_type == "latent" and spec.latent_output
    return {**found, **pictures, "generator": generators, "output_type": "latent" if latent else "pil"}


def check_call(extra: Mapping[str, Any], pipe: Any) -> None:
    """``call.NAME`` must be an argument of the pipeline.

    Raises:
        UsageError: it is not.
    """
    known = inspect.signature(type(pipe).__call__).parameters
    for name in extra:
        if name not in known:
            raise UsageError(f"call.{name}: {type(pipe).__name__} has no such argument; {did_you_mean(name, known)}")


def scheduler_named(name: str, current: Any) -> Any:
    """A scheduler of another class with the configuration of the current one.

    Raises:
        PlanRefused: diffusers has no such class, or it does not fit what the model predicts.
    """
    import diffusers

    problems = check_scheduler(name, {**current.config, "_class_name": type(current).__name__})
    if problems:
        raise PlanRefused(problems)
    return getattr(diffusers, name).from_config(current.config)
