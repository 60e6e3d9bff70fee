"""Read LoRA files (Hu et al. 2021, arXiv:2106.09685) as what they add to weights.

Diffusers reads the files, in any format that it knows, into adapters of models on the meta device. What the adapters
hold is added to the tensors, or to the parts of tensors, that a rank reads.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from xdit_core.errors import ModelError

Delta = Callable[[], torch.Tensor]
Deltas = Mapping[str, Delta]


def takers(pipe: Any) -> dict[str, nn.Module]:
    """Return the models of a pipeline that diffusers adds LoRAs to, by name."""
    names = getattr(pipe, "_lora_loadable_modules", ())
    return {name: part for name, part in pipe.components.items() if name in names and isinstance(part, nn.Module)}


def read_loras(pipe: Any, models: Mapping[str, nn.Module], loras: Mapping[str, float]) -> dict[str, Deltas]:
    """Read LoRA files.

    Args:
        pipe: a pipeline of the class that the LoRAs were made for; it is not changed.
        models: copies of its models that take LoRAs, with parameters on the meta device. They get the adapters and must
            not be used for anything else afterwards.
        loras: scale of each file or folder, by path.

    Returns:
        For each model a function for each changed parameter, which returns the change in float32.

    Raises:
        ModelError: the pipeline takes no LoRA, or the LoRA changes more than weights.
    """
    kind = type(pipe).__name__
    if not loras:
        return {}
    if not hasattr(pipe, "load_lora_weights"):
        raise ModelError(f"diffusers has no LoRA loader for {kind}; leave out lora=.")
    shapes = {name: {k: p.shape for k, p in model.named_parameters()} for name, model in models.items()}
    for model in models.values():
        stand_in(model)
    reader = copy.copy(pipe)  # without models that hold values: diffusers takes hooks off them
    others = {name: models.get(name) for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    reader.register_modules(**others)
    scales = {}
    for i, (path, scale) in enumerate(sorted(loras.items())):  # in one order, as a sum depends on it
        scales[f"lora{i}"] = scale
        try:
            reader.load_lora_weights(path, adapter_name=f"lora{i}")
        except Exception as error:  # diffusers and peft raise many unrelated classes
            reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
            raise ModelError(f"lora={path} cannot be read as a LoRA for {kind}: {reason}") from error
    deltas_of = {name: deltas(model, scales, shapes[name]) for name, model in models.items()}
    if not any(deltas_of.values()):
        raise ModelError(
            f"lora={', '.join(loras)} holds nothing for a part of {kind}; give a LoRA that was made for this model."
        )
    return deltas_of


def stand_in(model: nn.Module) -> None:
    """Pretend that parameters on the meta device have a device, since adapters follow it; no memory is allocated."""
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            module.register_parameter(
                name, nn.Parameter(p.new_empty((), device="cpu").expand(p.shape), requires_grad=False)
            )


def adapted(module: nn.Module) -> dict[str, Any]:
    """Return the layers with adapters, by the name of the layer that they replace."""
    from peft.tuners.lora import LoraLayer

    return {name: layer for name, layer in module.named_modules() if isinstance(layer, LoraLayer)}


def deltas(model: nn.Module, scales: Mapping[str, float], shapes: Mapping[str, torch.Size]) -> Deltas:
    """Return the sum of what the adapters add to each weight, by its name.

    Raises:
        ModelError: an adapter is not a sum of low-rank products, or changes more than weights.
    """
    fix = "it cannot be added to weights that are divided; merge it into the checkpoint first"
    sums: dict[str, Delta] = {}
    layers = adapted(model)
    for name, part in model.named_parameters():
        if ".lora_" not in name and name.replace(".base_layer", "") not in shapes:
            raise ModelError(f"the LoRA adds {name} to the model; {fix}.")
        if ".lora_" not in name and part.shape != shapes[name.replace(".base_layer", "")]:
            raise ModelError(f"the LoRA changes the shape of {name}; {fix}.")
    for name, layer in layers.items():
        if any(len(getattr(layer, more, ())) for more in ("lora_magnitude_vector", "lora_variant")) or any(
            layer.lora_bias.values()
        ):
            raise ModelError(f"the LoRA is a DoRA or has a bias (at {name}); {fix}.")

        def delta(layer: Any = layer) -> torch.Tensor:
            parts = [layer.get_delta_weight(a).float() * scale for a, scale in scales.items() if a in layer.lora_A]
            return torch.stack(parts).sum(0)

        sums[f"{name}.weight"] = delta
    return sums
