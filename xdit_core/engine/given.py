"""Use a pipeline that the user has loaded: refuse what cannot work, and make an own pipeline over the same tensors.

The user's pipeline is not changed. The own pipeline has modules of its own. Their parameters share memory with the
user's until a strategy divides them or they move to another device. If the user drops his pipeline, the memory that
this rank does not need is freed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType, SimpleNamespace
from typing import Any

import torch
from torch import nn

from xdit_core.checkpoints.model_facts import facts
from xdit_core.engine.loading import Change, Loaded, Part, fill, quiet
from xdit_core.engine.lora.adapters import takers
from xdit_core.engine.tensors import ModuleTensors, hollow, shared, twin
from xdit_core.errors import PlanRefused
from xdit_core.model_spec import ModelSpec
from xdit_core.records import ModelFacts, Problem, join_words

PLAIN = (bool, int, float, str)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
NO_HOOKS = SimpleNamespace(hooks=())  # diffusers leaves an empty registry on every denoiser that was called
# Set by libraries on a module without changing what it computes.
HARMLESS = frozenset(("training", "gradient_checkpointing", "lora_scale"))


@quiet()
def adopt_pipeline(
    spec: ModelSpec,
    pipe: Any,
    blocks: range,
    device: torch.device,
    changes: Sequence[Change] = (),
    loras: Mapping[str, float] = MappingProxyType({}),
) -> Loaded:
    """Make a pipeline like the given one whose denoisers hold only what this rank needs.

    The same code loads it as a pipeline from a folder.

    Args:
        spec, blocks, device, changes, loras: see ``load_pipeline``.
        pipe: the user's pipeline, which has passed ``check_given``; it is not changed.

    Raises:
        ModelError: a LoRA does not fit.
    """
    mine = copy.copy(pipe)
    given = {name: part for name in spec.checkpoint.denoisers if (part := getattr(pipe, name, None)) is not None}
    shapes = {name: twin(part, hollow) for name, part in given.items()}
    others = {
        name: twin(part, shared) if isinstance(part, nn.Module) else copy.deepcopy(part)
        for name, part in pipe.components.items()
        if part is not None and name not in given and (isinstance(part, nn.Module) or hasattr(part, "set_timesteps"))
    }
    mine.register_modules(**shapes, **others)
    parts, encoders = (
        {
            name: Part(partial(twin, part, hollow), partial(ModuleTensors, part), f"the given {type(part).__name__}")
            for name, part in models.items()
        }
        for models in (given, {name: part for name, part in takers(mine).items() if name not in given})
    )
    loaded = fill(mine, spec, parts, encoders, shapes, blocks, device, changes, loras)
    return Loaded(loaded.pipe, {})  # reading again would keep all of the user's pipeline in memory


def precision(pipe: Any, spec: ModelSpec) -> torch.dtype:
    """Return the dtype of most of the denoiser's numbers."""
    counts: dict[torch.dtype, int] = {}
    for p in getattr(pipe, spec.checkpoint.denoiser).parameters():
        if p.is_floating_point():
            counts[p.dtype] = counts.get(p.dtype, 0) + p.numel()
    return max(counts, key=lambda dtype: counts[dtype])


def check_given(pipe: Any, spec: ModelSpec, wanted: ModelFacts, asked: Mapping[str, Any], dtype: str | None) -> None:
    """Refuse a pipeline of which something would be lost or misread when its denoiser is divided.

    Args:
        wanted: of the plan.
        asked: the shared settings and ``call.*`` from which the facts of the plan were made.
        dtype: of the plan.

    Raises:
        PlanRefused: lists every problem.
    """
    known, name = (*spec.checkpoint.pipelines, *spec.checkpoint.more_pipelines), type(pipe).__name__
    if name not in known or not type(pipe).__module__.startswith("diffusers."):
        what = f"pipe= is a {name}, and model={spec.name} knows only {join_words(known)} as diffusers ships it"
        raise PlanRefused([Problem(what, "give such a pipeline, or choose the model that fits")])
    if getattr(pipe, spec.checkpoint.denoiser, None) is None:
        raise PlanRefused([Problem(f"pipe= has no {spec.checkpoint.denoiser}", "give a whole pipeline")])
    problems = [*changed_pipeline(pipe), *changed_components(pipe)]
    for part in spec.checkpoint.denoisers:
        if not problems and getattr(pipe, part, None) is not None:
            problems += changed_denoiser(part, getattr(pipe, part))
    if not problems:
        problems += other_model(pipe, spec, wanted, asked)
        if dtype is not None and precision(pipe, spec) is not getattr(torch, dtype):
            has = str(precision(pipe, spec)).removeprefix("torch.")
            what = f"pipe= is in {has} and the plan says dtype={dtype}"
            problems.append(
                Problem(what, f"leave out dtype=, or load it with from_pretrained(..., dtype=torch.{dtype})")
            )
    if problems:
        raise PlanRefused(problems)


def changed_pipeline(pipe: Any) -> Iterator[Problem]:
    """Find methods of the pipeline that were replaced, by hand or by another Engine."""
    replaced = [
        name for name, value in vars(pipe).items() if callable(value) and callable(getattr(type(pipe), name, None))
    ]
    if replaced:
        yield Problem(
            f"{join_words(replaced)} of pipe= was replaced, by another Engine or by hand",
            "give a freshly loaded pipeline",
        )


def changed_components(pipe: Any) -> Iterator[Problem]:
    """Find components that cannot be used."""
    for name, part in pipe.components.items():
        if not isinstance(part, nn.Module):
            continue
        if getattr(part, "hf_quantizer", None) is not None or getattr(part, "quantization_method", None) is not None:
            yield Problem(
                f"{name} of pipe= is quantized, and only plain weights can be divided", f"pipe.{name}.dequantize()"
            )
        elif any(p.is_meta for p in part.parameters()):
            yield Problem(f"{name} of pipe= has no weights yet (they are on the meta device)", "give a loaded pipeline")
        elif adapters := live_adapters(part):
            fix = (
                "merge them with pipe.fuse_lora() and pipe.unload_lora_weights(), or give them as lora=PATH to a "
                "plain pipeline"
            )
            yield Problem(f"{name} of pipe= has adapters ({join_words(adapters)}), which cannot be divided", fix)
        elif any(hasattr(m, "_hf_hook") or getattr(m, "_diffusers_hook", NO_HOOKS).hooks for m in part.modules()):
            fix = "call pipe.remove_all_hooks(), or give a pipeline without them; the plugin offload does such work"
            yield Problem(f"{name} of pipe= has hooks of accelerate or diffusers (offloading, casting or caching)", fix)


def live_adapters(module: nn.Module) -> list[str]:
    """Return the names of the peft adapters in a module."""
    names: dict[str, None] = {}
    for part in module.modules():
        if hasattr(part, "lora_A") or hasattr(part, "base_layer"):
            names |= dict.fromkeys(getattr(part, "lora_A", {"unnamed": None}))
    return list(names)


def changed_denoiser(name: str, given: nn.Module) -> Iterator[Problem]:
    """Find what differs from a fresh module of the same class, other than the values of tensors."""
    from accelerate import init_empty_weights

    with quiet(), init_empty_weights():
        fresh = type(given).from_config(given.config)  # type: ignore[attr-defined]
    differences = [*compare(fresh, given)]
    if differences:
        more = f" and {len(differences) - 1} more" if len(differences) > 1 else ""
        fix = "give the pipeline as it was loaded; strategies would not see such a change, or drop it"
        yield Problem(f"{name} of pipe= was changed after it was made: {differences[0]}{more}", fix)


def compare(fresh: nn.Module, given: nn.Module) -> Iterator[str]:
    """Describe modules, attributes and hooks that the fresh module does not have."""
    expected, actual = dict(fresh.named_modules()), dict(given.named_modules())
    for name in [*expected.keys() - actual.keys(), *actual.keys() - expected.keys()]:
        yield f"{name} was {'removed' if name in expected else 'added'}"
    for name, module in actual.items():
        if name in expected:
            where = name or "it"
            if type(module) is not type(expected[name]):
                yield f"{where} is a {type(module).__name__} and was a {type(expected[name]).__name__}"
            if any(getattr(module, hooks, None) for hooks in HOOKS):
                yield f"{where} has forward hooks"
            yield from (f"{where} has {what}" for what in changed_attributes(expected[name], module))


def changed_attributes(expected: nn.Module, actual: nn.Module) -> Iterator[str]:
    """Find numbers, texts, methods and attention processors that differ; tables and caches are not compared."""
    for name in sorted(vars(actual).keys() - HARMLESS):
        value, other = vars(actual)[name], vars(expected).get(name)
        if name.startswith("_") or value is other:
            continue
        if callable(value) and callable(getattr(type(actual), name, None)):
            yield f"a {name} of its own"
        elif isinstance(value, PLAIN):
            if type(value) is not type(other) or value != other:
                yield f"{name}={value}"
        elif type(value) is not type(other) and "Processor" in type(value).__name__ + type(other).__name__:
            yield f"the {name} {type(value).__name__}"
        elif "Processor" in type(value).__name__:
            yield from (
                f"{name}.{k}={v}" for k, v in vars(value).items() if v != vars(other).get(k) and isinstance(v, PLAIN)
            )


def other_model(pipe: Any, spec: ModelSpec, wanted: ModelFacts, asked: Mapping[str, Any]) -> Iterator[Problem]:
    """Find facts of the plan, read from the folder, that differ in this pipeline."""
    actual = facts(spec, configs_of(pipe, {}), asked)
    for field in wanted.__dataclass_fields__:
        has, planned = getattr(actual, field), getattr(wanted, field)
        if field != "loras" and has != planned:
            what = f"pipe= has {field}={has} where the plan was made for {field}={planned}"
            yield Problem(what, "make the plan with the model.path= of the same checkpoint")


def configs_of(pipe: Any, index: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configs of the components by name, and ``model_index.json`` as ``_index``."""
    configs: dict[str, Any] = {"_index": {**index, **pipe.config}}
    for name, part in pipe.components.items():
        config: Any = getattr(part, "config", None)
        config = config.to_dict() if hasattr(config, "to_dict") else config
        if isinstance(config, Mapping):
            configs[name] = config
    return configs
