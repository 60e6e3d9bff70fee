"""What the tests of strategies compare: latents of a plan on some ranks against the serial diffusers pipeline."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from xdit_core.engine.engine import Engine
from xdit_core.plan import Plan
from xdit_core.planning.planner import make_plan
from xdit_core.registry.registry import Registry

STEPS, TEXT = 4, 5


def plan_for(plugins: Sequence[str], folder: str, settings: Mapping[str, Any] | None = None, **extra: Any) -> Plan:
    """A plan for a tiny checkpoint: 4 steps, latents, 5 zero tokens in place of a T5."""
    base = {"model": "sd3", "model.path": str(folder), "steps": STEPS, "output_type": "latent"}
    base |= {"max_sequence_length": TEXT, "device": "cpu"}
    return make_plan(plugins, {**base, **(settings or {})}, Registry(**extra))


def generate(
    plugins: Sequence[str],
    folder: str,
    settings: Mapping[str, Any] | None = None,
    prompt: str = "a red fox",
    changes: Mapping[str, Any] | None = None,
) -> tuple[torch.Tensor, dict[str, int]]:
    """On every rank of the current group: make the plan, run it.

    Returns:
        The latents and the bytes sent by this rank, by axis.
    """
    torch.set_num_threads(1)
    engine = Engine(plan_for(plugins, folder, settings))
    try:
        output = engine.generate(prompt, **(changes or {}))
        if output.latents is None:
            raise RuntimeError("no latents")
        return output.latents.clone(), dict(engine.rank.sent)
    finally:
        engine.close()


def diffusers_latents(
    folder: str,
    prompt: str = "a red fox",
    scheduler: str | None = None,
    dtype: torch.dtype | None = None,
    **changes: Any,
) -> torch.Tensor:
    """The oracle: the unmodified pipeline, called as a user of diffusers would."""
    import diffusers

    index = json.loads((Path(folder) / "model_index.json").read_text())
    absent = {name: None for name, entry in index.items() if isinstance(entry, list) and entry[0] is None}
    pipe = getattr(diffusers, index["_class_name"]).from_pretrained(folder, dtype=dtype, **absent)
    pipe.set_progress_bar_config(disable=True)
    if scheduler:
        pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    images = changes.pop("num_images_per_prompt", 1)
    arguments = {"num_inference_steps": STEPS, "guidance_scale": 7.0, "max_sequence_length": TEXT, **changes}
    generators = [torch.Generator().manual_seed(i) for i in range(images)]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        latents: torch.Tensor = pipe(
            prompt, num_images_per_prompt=images, generator=generators, output_type="latent", **arguments
        )[0]
    return latents


def changed_record(record: Any, path: str, value: Any) -> Any:
    """A record with another value for one field, which may lie in a record inside it.

    Args:
        path: such as ``trunk.stream.tokens``.
    """
    field, _, rest = path.partition(".")
    return dataclasses.replace(
        record, **{field: changed_record(getattr(record, field), rest, value) if rest else value}
    )
