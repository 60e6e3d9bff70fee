"""Run a case, and what it must equal: diffusers picture by picture, or the displaced schedule in one process."""

from __future__ import annotations

import functools
import json
import tempfile
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from helpers.fuzz.drawing import Ask, Case
from helpers.models.families import FAMILIES
from helpers.models.families import settings as family_settings
from helpers.models.lora import random_lora
from helpers.models.tiny import saved
from xdit_core import Engine, Plan, XditError
from xdit_core.testing.pool import Pool, PoolError
from xdit_core.testing.runs import plan_for

# of the largest value, in float32; random weights amplify what rounding does, mistakes are a thousand times larger
EXACT = 2e-4
NAMES = {"height": "height", "width": "width", "frames": "num_frames"}


@dataclass(frozen=True)
class Verdict:
    """What became of a case: ``equal``, ``refused``, ``skipped`` (diffusers cannot do it either) or ``wrong``, and the
    reason."""

    kind: str
    why: str = ""


def read(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """Look at the latents."""
    tensors["latents"].mean().item()
    return tensors


def scale(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """Other latents."""
    return {**tensors, "latents": tensors["latents"] * 0.97}


def inplace(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """The same tensor, written to."""
    tensors["latents"].mul_(0.97)
    return tensors


CALLBACKS: Mapping[str, Callable[..., Any]] = {"read": read, "scale": scale, "inplace": inplace}


@functools.cache
def folder_of(name: str) -> str:
    """The tiny checkpoint of a family."""
    family = FAMILIES[name]
    return saved(family.model, Path(tempfile.mkdtemp(prefix="fuzz-")) / name, **family.options)


@functools.cache
def adapter_of(name: str) -> str:
    """A LoRA for it."""
    return random_lora(pipeline(name, "float32", False), Path(tempfile.mkdtemp(prefix="fuzz-")) / "lora")


def pipeline(name: str, dtype: str, lora: str | bool, scale: float = 1.0) -> Any:
    """The pipeline as a user of diffusers loads it."""
    import diffusers

    folder = folder_of(name) if not Path(name).is_dir() else name
    index = json.loads((Path(folder) / "model_index.json").read_text())
    absent = {key: None for key, entry in index.items() if isinstance(entry, list) and entry[0] is None}
    pipe = getattr(diffusers, index["_class_name"]).from_pretrained(folder, dtype=getattr(torch, dtype), **absent)
    pipe.set_progress_bar_config(disable=True)
    if lora:
        pipe.load_lora_weights(lora, adapter_name="a")
        pipe.set_adapters(["a"], [scale])
    return pipe


def settings_of(case: Case, folder: str, lora: str) -> dict[str, Any]:
    """Settings of the plan."""
    first = case.asks[0]
    own = family_settings(FAMILIES[case.family], images=1, steps=first.steps, dtype=case.dtype)
    values = {**own, "model.path": folder, **case.values}
    if not first.guided:
        values |= FAMILIES[case.family].plain[0]
    if case.scheduler:
        values["scheduler"] = case.scheduler
    if case.lora:
        values["lora"] = [f"{lora}:{case.lora}"]
    return values


def changes_of(case: Case, one: Ask, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a request changes of the plan."""
    family = FAMILIES[case.family]
    found: dict[str, Any] = {"seed": one.seed, "images": one.images, "steps": one.steps}
    found |= {key: getattr(one, key) for key in NAMES if getattr(one, key) is not None}
    for key in ("guidance", "negative"):
        value = (family.plain[0] if family.plain and not one.guided else family.ours).get(key, family.ours.get(key))
        if value is not None or settings.get(key) is not None:
            found[key] = value
    call = dict(one.call)
    if one.callback:
        call["callback_on_step_end"] = CALLBACKS[one.callback]
    return {**found, "call": call} if call else found


def run(case: Case, folder: str, lora: str) -> list[Any]:
    """On every rank: latents of each request and prompt, or the sentence with which it was refused."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    settings = settings_of(case, folder, lora)
    results: list[Any] = []
    with torch.inference_mode(case.inference):
        try:
            plan = plan_for(list(case.plugins), folder, settings)
            engine = Engine(plan, pipe=pipeline(folder, case.dtype, False) if case.given else None)
        except XditError as error:
            return [f"{type(error).__name__}: {error}"]
        for one in case.asks:
            try:
                outputs = engine.generate_all(list(one.prompts), **changes_of(case, one, settings))
                results.append([output.latents.clone() for output in outputs])
            except XditError as error:
                results.append(f"{type(error).__name__}: {error}")
        engine.close()
    return results


def serial(case: Case, one: Ask, lora: str, dtype: str) -> list[torch.Tensor]:
    """Diffusers, one picture after the other, each with its own seed."""
    import diffusers

    family = FAMILIES[case.family]
    pipe = pipeline(case.family, dtype, lora if case.lora else False, case.lora)
    if case.scheduler:
        pipe.scheduler = getattr(diffusers, case.scheduler).from_config(pipe.scheduler.config)
    given: list[torch.Tensor] = []
    if type(pipe).__name__ == "DiTPipeline":
        decode = pipe.vae.decode
        pipe.vae.decode = lambda latents: (given.append(latents), decode(latents))[1]
    arguments = {**family.theirs, **({} if one.guided else family.plain[1]), **one.call}
    for key in ("num_images_per_prompt", "num_videos_per_prompt"):
        arguments |= {key: 1} if key in arguments else {}
    if "class_labels" in arguments:
        arguments["class_labels"] = arguments["class_labels"][:1]
    for key, word in NAMES.items():
        if getattr(one, key) is not None:
            arguments[word] = getattr(one, key)
    if one.callback:
        arguments["callback_on_step_end"] = CALLBACKS[one.callback]
    results = []
    for prompt in one.prompts:
        if "prompt" in arguments:
            arguments["prompt"] = prompt
        pictures = []
        for i in range(one.images):
            generator = [torch.Generator().manual_seed(one.seed + i)]
            with torch.random.fork_rng(), torch.no_grad():
                torch.manual_seed(one.seed + i)
                found = pipe(**arguments, num_inference_steps=one.steps, generator=generator, output_type="latent")
            pictures.append(given[-1] if given else found[0])
        results.append(torch.cat(pictures))
    return results


def reference(case: Case, plan: Plan, one: Ask, lora: str, dtype: str) -> list[torch.Tensor]:
    """The displaced schedule in one process, loaded from disk, one picture after the other, each in a new engine."""
    alone = replace(
        case,
        plugins=tuple(plan.displaced),
        values=dict(plan.reference),
        given=False,
        inference=False,
        dtype=dtype,
        asks=(replace(case.asks[0], steps=max(one.steps, case.asks[0].steps)),),
    )
    results = []
    for prompt in one.prompts:
        pictures = []
        for i in range(one.images):
            single = replace(one, prompts=(prompt,), seed=one.seed + i, images=1)
            (answer,) = run(replace(alone, asks=(single,)), folder_of(case.family), lora)
            if isinstance(answer, str):
                raise RuntimeError(answer)
            pictures += answer
        results.append(torch.cat(pictures))
    return results


class Fuzzer:
    """Runs cases on a pool of workers."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool

    def close(self) -> None:
        """End the workers."""
        self.pool.close()

    def judge(self, case: Case, timeout: float = 90) -> Verdict:
        """Compare a case on all its ranks with what it must equal."""
        folder = folder_of(case.family)
        lora = adapter_of(case.family) if case.lora else ""
        try:
            plan = plan_for(list(case.plugins), folder, settings_of(case, folder, lora))
        except XditError as error:
            return Verdict("refused", f"{type(error).__name__}: {error}")
        except Exception:
            return Verdict("wrong", f"the plan: {traceback.format_exc()}")
        try:
            ranks = self.pool.run(run, case, folder, lora, world=plan.world, timeout=timeout)
        except PoolError as error:
            try:
                for one in case.asks:
                    serial(case, one, lora, case.dtype)
            except Exception:
                return Verdict("skipped", str(error))
            return Verdict("wrong", str(error))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.compare(case, plan, ranks, lora)

    def compare(self, case: Case, plan: Plan, ranks: list[list[Any]], lora: str) -> Verdict:
        """Every request on every rank."""
        refused, skipped, equal = [], [], 0
        for i, one in enumerate(case.asks):
            answers = [rank[i] if i < len(rank) else rank[-1] for rank in ranks]
            said = [a for a in answers if isinstance(a, str)]
            if said:
                if len(said) < len(ranks):
                    return Verdict("wrong", f"request {i}: {len(said)} of {len(ranks)} ranks refuse: {said[0]}")
                refused.append(said[0])
                continue
            try:
                wanted = (
                    reference(case, plan, one, lora, case.dtype)
                    if plan.displaced
                    else serial(case, one, lora, case.dtype)
                )
            except Exception as error:
                skipped.append(f"request {i} has no oracle: {type(error).__name__}: {error}")
                continue
            if not all(x.isfinite().all() for x in wanted):
                skipped.append(f"request {i}: the oracle is not finite")
                continue
            bound = self.bound(case, plan, one, lora, wanted)
            for rank, answer in enumerate(answers):
                for prompt, (mine, want) in enumerate(zip(answer, wanted, strict=True)):
                    if mine.shape != want.shape:
                        return Verdict(
                            "wrong", f"request {i} prompt {prompt} rank {rank}: {mine.shape} for {want.shape}"
                        )
                    off = (mine.float() - want.float()).abs().max().item() / max(1.0, want.abs().max().item())
                    if not off <= bound:
                        return Verdict(
                            "wrong",
                            f"request {i} prompt {prompt} rank {rank} of {plan.world}: {off:.2g} off, bound "
                            f"{bound:.2g}",
                        )
            equal += 1
        if equal:
            return Verdict("equal", f"{equal} requests")
        return Verdict("refused", refused[0]) if refused else Verdict("skipped", skipped[0])

    def bound(self, case: Case, plan: Plan, one: Ask, lora: str, wanted: list[torch.Tensor]) -> float:
        """How far a result may be off: in half precision some times what rounding does to the oracle itself."""
        if case.dtype == "float32":
            return EXACT
        exact = reference(case, plan, one, lora, "float32") if plan.displaced else serial(case, one, lora, "float32")
        pairs = zip(wanted, exact, strict=True)
        rounding = max((a.float() - b).abs().max().item() / max(1.0, b.abs().max().item()) for a, b in pairs)
        return max(4 * rounding, 1e-3)
