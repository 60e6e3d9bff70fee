"""Random cases: a model, a dtype, some strategies with degrees, a scheduler, how the pipeline is loaded, and requests
in one engine."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from helpers.models.families import FAMILIES, Family

STEP_CALLBACKS = (
    "sd3",
    "flux",
    "hunyuandit",
    "cogvideox-2b",
    "cogvideox-5b",
    "cogvideox-1.5",
    "wan-2.1",
    "wan-5b",
    "qwen_image",
    "z_image",
)
ADAPTED = ("sd3", "flux", "qwen_image", "wan-2.1", "cogvideox-2b", "z_image")  # families whose LoRAs diffusers reads
UNITS = {
    "sd3": 4,
    "flux": 4,
    "qwen_image": 4,
    "z_image": 4,
    "hunyuandit": 16,
    "wan-2.1": 16,
    "wan-2.2": 16,
    "wan-5b": 16,
}
COMMON_SCHEDULERS = {
    True: (
        "FlowMatchEulerDiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler",
        "FlowMatchLCMScheduler",
        "UniPCMultistepScheduler",
    ),
    False: (
        "DDIMScheduler",
        "DDPMScheduler",
        "EulerAncestralDiscreteScheduler",
        "HeunDiscreteScheduler",
        "LCMScheduler",
    ),
}
FLOW = ("sd3", "flux", "qwen_image", "z_image", "z_image-masked", "wan-2.1", "wan-2.2", "wan-5b")
PROMPTS = ("a red fox", "a red fox in the snow", "the fox", "snow")


@dataclass(frozen=True)
class Ask:
    """One request; None stands for what the plan says.

    Args:
        callback: what a step callback does with the latents: ``read``, ``scale`` (another tensor) or ``inplace``; ""
            for no callback.
        guided: with guidance.
    """

    prompts: tuple[str, ...] = (PROMPTS[0],)
    seed: int = 0
    images: int = 1
    steps: int = 3
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    guided: bool = True
    callback: str = ""
    call: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One engine and what it is asked.

    Args:
        family: key of ``families.FAMILIES``.
        plugins: strategies.
        values: their settings.
        scheduler: a diffusers class, "" for the model's.
        dtype: of the weights.
        given: the pipeline is loaded by the user, and not by the engine.
        inference: everything happens in inference mode.
        lora: scale of an adapter that is added, 0 for none.
        asks: requests, one after the other.
    """

    family: str
    plugins: tuple[str, ...] = ()
    values: Mapping[str, Any] = field(default_factory=dict)
    scheduler: str = ""
    dtype: str = "float32"
    given: bool = False
    inference: bool = False
    lora: float = 0.0
    asks: tuple[Ask, ...] = (Ask(),)

    def __str__(self) -> str:
        words = {k: v for k, v in asdict(self).items() if v not in ((), "", False, 0.0, {}) and k != "asks"}
        asks = [{k: v for k, v in asdict(a).items() if v not in (None, "", {})} for a in self.asks]
        return f"{words} asks {asks}"


def draw(seed: int, schedulers: tuple[str, ...], fast: bool = False) -> Case:
    """The case of a seed.

    Args:
        schedulers: names of scheduler classes to draw from, now and then.
        fast: small worlds and one dtype, for a budget of seconds.
    """
    rng = random.Random(seed)
    name = rng.choice(list(FAMILIES))
    family = FAMILIES[name]
    plugins, values = strategies(rng, family, fast)
    scheduler = ""
    if rng.random() < 0.4:
        scheduler = rng.choice(schedulers if rng.random() < 0.4 else COMMON_SCHEDULERS[name in FLOW])
    return Case(
        family=name,
        plugins=plugins,
        values=values,
        scheduler=scheduler,
        dtype="float32" if fast or rng.random() < 0.75 else rng.choice(("bfloat16", "float16")),
        given=rng.random() < 0.25,
        inference=rng.random() < 0.2,
        lora=rng.choice((1.0, 0.5)) if name in ADAPTED and rng.random() < 0.15 else 0.0,
        asks=tuple(ask(rng, name) for _ in range(rng.choice((1, 1, 2, 3)))),
    )


def strategies(rng: random.Random, family: Family, fast: bool) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Some strategies that the family allows, on few ranks."""
    usual = [n for n in family.strategies if n != "parallel_vae"]
    names = sorted(set(rng.sample(usual, k=min(len(usual), rng.choice((0, 1, 1, 2, 2, 3))))))
    two, most = (1, 2, 2), 4 if fast else 8
    while True:
        values: dict[str, Any] = {}
        world = 1
        for plugin in names:
            if plugin == "usp":
                values |= {"usp.ulysses": rng.choice(two), "usp.ring": rng.choice((1, 1, 2, 3))}
                world *= values["usp.ulysses"] * values["usp.ring"]
            elif plugin == "pipefusion":
                stages = rng.choice((1, 2, 2, 3))
                values |= {"pipefusion.stages": stages, "pipefusion.patches": rng.choice((1, 2, 3, 4))}
                values |= {"pipefusion.warmup": rng.choice((0, 1, 1, 2))}
                world *= stages
            elif plugin == "distrifusion":
                values |= {"distrifusion.degree": rng.choice((2, 2, 3)), "distrifusion.warmup": rng.choice((0, 1, 2))}
                world *= values["distrifusion.degree"]
            elif plugin in ("tp", "dp"):
                values[f"{plugin}.degree"] = 2
                world *= 2
            elif plugin == "cfg":
                world *= 2
            elif plugin == "compile":
                values["compile.backend"] = "eager"
            elif plugin == "flash":
                values["flash.kernel"] = "math"
        if world <= most:
            return tuple(names), values
        names.remove(rng.choice(names))


def ask(rng: random.Random, name: str) -> Ask:
    """A request; sizes of DiT are fixed."""
    family, unit = FAMILIES[name], UNITS.get(name, 8)
    subject = family.model == "dit"
    sized = not subject and rng.random() < 0.4
    low, high = (2, 6) if unit == 16 else (4, 8)
    call: dict[str, Any] = {}
    if name == "z_image" and rng.random() < 0.3:
        call = {"cfg_truncation": rng.choice((0.3, 0.6)), "cfg_normalization": rng.random() < 0.5}
    if name == "sd3" and rng.random() < 0.25:
        call = {
            "skip_guidance_layers": [rng.randrange(3)],
            "skip_layer_guidance_start": 0.0,
            "skip_layer_guidance_stop": 0.6,
        }
    return Ask(
        prompts=("golden retriever",) if subject else tuple(rng.sample(PROMPTS, k=rng.choice((1, 1, 1, 2)))),
        seed=rng.randrange(100),
        images=rng.choice((1, 1, 2, 3)),
        steps=rng.choice((2, 3, 3, 4)),
        height=unit * rng.randint(low, high) if sized else None,
        width=unit * rng.randint(low, high) if sized else None,
        frames=rng.choice((1, 5, 9)) if name.startswith(("wan", "cogvideox")) and rng.random() < 0.3 else None,
        guided=family.plain is None or rng.random() < 0.85,
        callback=rng.choice(("read", "scale", "inplace")) if name in STEP_CALLBACKS and rng.random() < 0.25 else "",
        call=call,
    )


def simpler(case: Case) -> list[Case]:
    """Cases with one thing less, for finding what a failure needs."""
    found = [
        replace(case, asks=case.asks[:i] + case.asks[i + 1 :])
        for i in range(len(case.asks) if len(case.asks) > 1 else 0)
    ]
    for name, plain in (("scheduler", ""), ("dtype", "float32"), ("given", False), ("inference", False), ("lora", 0.0)):
        if getattr(case, name) != plain:
            found.append(replace(case, **{name: plain}))
    for plugin in case.plugins:
        kept = {k: v for k, v in case.values.items() if not k.startswith(plugin + ".")}
        found.append(replace(case, plugins=tuple(p for p in case.plugins if p != plugin), values=kept))
    for key, value in case.values.items():
        if isinstance(value, int) and value > 1:
            found.append(replace(case, values={**case.values, key: value - 1}))
    for i, one in enumerate(case.asks):
        changes: list[dict[str, Any]] = [
            {"callback": ""},
            {"call": {}},
            {"images": 1},
            {"height": None, "width": None},
            {"frames": None},
        ]
        changes += [{"prompts": one.prompts[:1]}, {"seed": 0}, {"guided": True}]
        for change in changes:
            less = replace(one, **change)
            if less != one:
                found.append(replace(case, asks=(*case.asks[:i], less, *case.asks[i + 1 :])))
    return found
