"""Check the settings of a plan and of each request: values, sizes, and what the model takes. Without torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any

from xdit_core.checkpoints import model_facts
from xdit_core.errors import PlanRefused, UsageError
from xdit_core.filesystem import read_text, user_path
from xdit_core.model_spec import ModelSpec
from xdit_core.planning.degrees import MOST_RANKS
from xdit_core.records import Declaration, ModelFacts, Problem, join_words
from xdit_core.settings import RunSettings, parse_loras

SUBJECTS: Mapping[str, str] = MappingProxyType(
    {"prompt": "prompt", "class": "class_"}
)  # what to draw, and its field of RunSettings
BOUNDS: Mapping[str, tuple[int, int]] = (
    MappingProxyType(  # far above what makes sense, and below what hangs or breaks something
        {
            "steps": (1, 100_000),
            "images": (1, 100_000),
            "height": (1, model_facts.MOST_PIXELS),
            "width": (1, model_facts.MOST_PIXELS),
            "frames": (1, 100_000),
            "fps": (1, 1000),
            "threads": (1, 4096),
            "nproc": (1, MOST_RANKS),
            "keep_runs": (0, 1_000_000),
            "max_sequence_length": (0, 1_000_000),
        }
    )
)
LONGEST_TIMEOUT = 31_536_000  # seconds, which is a year
DTYPES = ("float32", "bfloat16", "float16")


def prompts_in(text: str) -> tuple[str, ...]:
    """The prompts in a text, one on each line; lines that begin with ``#`` are comments."""
    return tuple(line for part in text.split("\n") if (line := part.strip()) and not line.startswith("#"))


def with_defaults(run: RunSettings, spec: ModelSpec, configs: Mapping[str, Any]) -> RunSettings:
    """Fill in the model's defaults where the user gave nothing; the size defaults to that of the pipeline."""
    side = model_facts.default_size(configs[spec.checkpoint.denoiser], configs)
    defaults: dict[str, Any] = {"steps": 28, "height": side, "width": side, **spec.request.defaults}
    filled = {k: v for k, v in defaults.items() if getattr(run, k) is None}
    prompt = run.prompt
    if run.prompts is not None:
        path = user_path(run.prompts, "prompts=")
        text = read_text(path, f"prompts={run.prompts}", "give a text file")
        prompt += prompts_in(text)
        if not prompt:
            raise UsageError(f"prompts={run.prompts} holds no prompt; write one on each line.")
    subjects = tuple(getattr(run, SUBJECTS[spec.request.subject])) if spec.request.subject != "prompt" else prompt
    if len(run.seed) > 1 and run.images == 1:
        filled["images"] = len(run.seed)
    example = (spec.request.example,) if spec.request.example else ()
    return dataclasses.replace(run, prompt=subjects or example, **filled)


def check_taken(typed: RunSettings, spec: ModelSpec) -> list[Problem]:
    """Refuse settings of the user that the model's pipeline does not take.

    Args:
        typed: the shared settings as the user gave them.
    """
    problems = []
    for setting in spec.request.not_taken:
        if setting not in ("images", "height", "width") and getattr(typed, setting) is not None:
            value = getattr(typed, setting)
            problems.append(Problem(f"{spec.name} does not take {setting}={value}", f"leave out {setting}="))
    for setting, field in SUBJECTS.items():
        if setting != spec.request.subject and (
            getattr(typed, field) or (setting == "prompt" and typed.prompts is not None)
        ):
            example = f"{spec.request.subject}={spec.request.example or '...'}"
            problems.append(
                Problem(f"{spec.name} draws a {spec.request.subject}, not a {setting}", f"give for example {example}")
            )
    for setting in ("frames", "fps"):
        if spec.latents.frame_step is None and getattr(typed, setting) is not None:
            problems.append(
                Problem(f"{setting}={getattr(typed, setting)}: {spec.name} makes pictures", f"leave out {setting}=")
            )
    return problems


def check_subject(run: RunSettings, spec: ModelSpec, configs: Mapping[str, Any]) -> list[Problem]:
    """Refuse subjects that the model does not know, where it draws classes and no text."""
    problems: list[Problem] = []
    for subject in run.prompt if spec.request.encode_subject else ():
        try:
            spec.request.encode_subject(configs, subject, 1)  # type: ignore[misc]
        except PlanRefused as error:
            problems += error.problems
    return problems


def check_loras(run: RunSettings) -> list[Problem]:
    """Refuse LoRAs whose files are missing, and any where the package that reads them is missing."""
    try:
        loras = parse_loras(run.lora)
    except PlanRefused as error:
        return list(error.problems)
    if loras and find_spec("peft") is None:
        return [Problem("lora= needs the package peft", "pip install peft")]
    return []


def needs_blocks(name: str, declared: Declaration, facts: ModelFacts) -> list[Problem]:
    """Refuse a strategy that works on transformer blocks, for a denoiser without any.

    Args:
        name: of the strategy.
    """
    if declared.stages or any(w.point in ("trunk", "attention") for w in declared.wraps):
        return [
            Problem(
                f"{name} divides transformer blocks, and the U-Net of {facts.model} is not a list of blocks",
                f"drop {name}",
            )
        ]
    return []


def check_run(run: RunSettings) -> list[Problem]:
    """Refuse values that are out of range or unknown."""
    problems = []
    for name, (least, most) in BOUNDS.items():
        value = getattr(run, name)
        if value is not None and value < least:
            problems.append(Problem(f"{name}={value} is too small", f"give {least} or more"))
        if value is not None and value > most:
            problems.append(Problem(f"{name}={value} is too large", f"give {most} or less"))
    if run.output_type not in ("image", "latent"):
        problems.append(Problem(f"output_type={run.output_type} is unknown", "use image or latent"))
    if run.dtype is not None and run.dtype not in DTYPES:
        problems.append(Problem(f"dtype={run.dtype} is unknown", f"use one of {', '.join(DTYPES)}"))
    if run.device is not None and run.device not in ("cpu", "cuda"):
        problems.append(Problem(f"device={run.device} is unknown", "use cpu or cuda"))
    if run.patience > LONGEST_TIMEOUT:
        problems.append(
            Problem(f"timeout={run.timeout:g} is too large", f"give at most {LONGEST_TIMEOUT} seconds, which is a year")
        )
    if run.patience <= 0:
        problems.append(Problem(f"timeout={run.timeout} is too small", "give the seconds to wait, such as 600"))
    problems += check_seeds(run)
    return problems


def check_seeds(run: RunSettings) -> list[Problem]:
    """Refuse seeds of more than 64 bits, and several seeds that are not one for each picture."""
    problems = []
    too_long = [seed for seed in run.seed if not -(2**63) <= seed < 2**64]
    if too_long:
        problems.append(Problem(f"seed={too_long[0]} does not fit into 64 bits", "give a number from 0 to 2**64 - 1"))
    if not run.seed:
        problems.append(Problem("seed= names no number", "give one, such as seed=5"))
    if len(run.seed) > 1 and run.images != len(run.seed):
        problems.append(
            Problem(f"seed= names {len(run.seed)} seeds for images={run.images}", "leave out images=, or give one seed")
        )
    return problems


def check_size(run: RunSettings, facts: ModelFacts) -> list[Problem]:
    """Refuse sizes that are not a whole number of tokens or of latent frames."""
    step, problems = facts.pixels_per_token, []
    for name in ("height", "width"):
        value = getattr(run, name) or 0
        if value > 0 and value % step:
            low = value // step * step
            near = join_words([v for v in (low, low + step) if v])
            problems.append(
                Problem(f"{name}={value} is not a multiple of {step}, as {facts.model} needs", f"nearest are {near}")
            )
    if facts.video and ((run.frames or 1) - 1) % facts.frame_step:
        low = ((run.frames or 1) - 1) // facts.frame_step * facts.frame_step + 1
        near = join_words([low, low + facts.frame_step])
        what = f"frames={run.frames} is not a multiple of {facts.frame_step} plus 1, as {facts.model} needs"
        problems.append(Problem(what, f"nearest are {near}"))
    return problems


def check_lora_scale(run: RunSettings, call: Mapping[str, Any]) -> list[Problem]:
    """Refuse to scale a LoRA in a call, because LoRAs are added to the weights once.

    Args:
        call: further arguments of the pipeline's ``__call__``.
    """
    problems = []
    for name, value in call.items():
        scale = value.get("scale") if name.endswith("attention_kwargs") and isinstance(value, Mapping) else None
        if run.lora and scale is not None and scale != 1:
            fix = f"write the scale behind the path, lora={run.lora[0].partition(':')[0]}:{scale}"
            problems.append(
                Problem(
                    f"call.{name} scales a LoRA by {scale}, and lora= adds it to the weights before the first call", fix
                )
            )
    return problems
