"""Guidance that changes while a request runs, as callbacks of the pipeline."""

from __future__ import annotations


def drop_guidance(pipe, step, timestep, tensors):
    """The documented way to switch guidance off in mid-run: from the third step on there is no unconditional half."""
    if step == 1:
        pipe._guidance_scale = 1.0
        tensors = {name: value.chunk(2)[-1] if name.endswith("embeds") else value for name, value in tensors.items()}
    return tensors


def late_guidance(pipe, step, timestep, tensors):
    """Guidance in every other step: the halves come and go."""
    halves = pipe.__dict__.setdefault("halves", {})
    if step == 0:
        halves.update({name: value for name, value in tensors.items() if name.endswith("embeds")})
    pipe._guidance_scale = 1.0 if step % 2 == 0 else 7.0
    return {
        name: (halves[name] if step % 2 else halves[name].chunk(2)[-1]) if name in halves else value
        for name, value in tensors.items()
    }


SCHEDULES = {"drop": drop_guidance, "alternate": late_guidance}
ASKED = ["latents", "prompt_embeds", "pooled_prompt_embeds"]
