"""Load a diffusers pipeline; of the denoiser only the blocks that this rank holds are read and allocated.

The denoiser is always read here: diffusers' own loader fills tensors that a checkpoint lacks with random numbers and a warning.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from xdit_core.checkpoint import INDEX, read_json, weight_files
from xdit_core.errors import ModelError
from xdit_core.lora import Delta, Deltas, load_loras
from xdit_core.records import ModelSpec
from xdit_core.trunk import Absent

Change = Callable[[nn.Module], None]


def load_pipeline(
    spec: ModelSpec,
    folder: Path,
    blocks: range,
    device: torch.device,
    dtype: torch.dtype,
    changes: Sequence[Change] = (),
    trust_remote_code: bool = False,
    loras: Mapping[str, float] = MappingProxyType({}),
) -> Any:
    """The pipeline of a local checkpoint folder.

    Args:
        spec: the model adapter's record.
        folder: has ``model_index.json``.
        blocks: indices of the blocks to hold.
        changes: what strategies do to the denoiser while its parameters are on the meta device.
        trust_remote_code: Python code that lies in the folder may run.
        loras: path to scale, to be added to the weights.

    Raises:
        ModelError: a component cannot be read.
    """
    import diffusers

    index = read_json(folder / INDEX)
    cls = getattr(diffusers, index["_class_name"])
    absent: dict[str, Any] = absent_components(cls, index)
    names = {name: index[name][1] for name in spec.denoisers if name in index and name not in absent}
    # the denoisers come at last; until then LoRA adapters, which name all blocks, are put onto their shapes
    shapes = {name: empty(class_name, folder / name) for name, class_name in names.items()}
    more = {"trust_remote_code": True} if trust_remote_code else {}
    try:
        pipe = cls.from_pretrained(folder, dtype=dtype, local_files_only=True, **more, **absent, **shapes)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{folder} cannot be loaded as {index['_class_name']}: {reason}") from error
    deltas: dict[str, Deltas] = load_loras(pipe, shapes, loras) if loras else {}
    for name, class_name in names.items():
        loaded = load_part(spec, folder / name, class_name, blocks, dtype, changes, deltas.get(name, {}))
        pipe.register_modules(**{name: loaded})
    return pipe.to(device)


def empty(class_name: str, folder: Path) -> nn.Module:
    """A denoiser with parameters on the meta device and computed buffers real."""
    import diffusers
    from accelerate import init_empty_weights

    cls = getattr(diffusers, class_name)
    with init_empty_weights():
        model: nn.Module = cls.from_config(cls.load_config(folder))
    return model


def absent_components(cls: type[Any], index: Mapping[str, Any]) -> dict[str, None]:
    """Constructor arguments that the folder lacks or lists as null, so that diffusers does not ask for them."""
    absent: dict[str, None] = {}
    for p in inspect.signature(cls.__init__).parameters.values():
        component = p.default is inspect.Parameter.empty or p.default is None
        entry = index.get(p.name)
        if p.name != "self" and (entry[0] is None if isinstance(entry, list) else component and p.name not in index):
            absent[p.name] = None
    return absent


def load_part(
    spec: ModelSpec,
    folder: Path,
    class_name: str,
    blocks: range,
    dtype: torch.dtype,
    changes: Sequence[Change] = (),
    deltas: Deltas = MappingProxyType({}),
) -> nn.Module:
    """The denoiser with ``Absent`` in place of the blocks that other stages hold; of a sharded parameter only the shard is read.

    Raises:
        ModelError: the checkpoint lacks a tensor that this rank needs.
    """
    from safetensors import safe_open

    model = empty(class_name, folder)
    start = 0
    for part in spec.blocks:
        for name in (part.attribute, *part.beside):
            modules = getattr(model, name)
            for i in range(len(modules)):
                if start + i not in blocks:
                    modules[i] = Absent(modules[i], spec.kept if start + i == 0 else ())
        start += len(modules)
    nn.Module.to(model, dtype)  # diffusers' own `to` warns about modules that it keeps in float32, which is done below
    for change in changes:
        change(model)
    needed = {**model.state_dict(), **dict(model.named_parameters())}  # parameters know how they are divided
    state: dict[str, torch.Tensor] = {}
    fp32 = tuple(getattr(type(model), "_keep_in_fp32_modules", None) or ())
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as tensors:
            for key in needed.keys() & set(tensors.keys()):
                keep = any(name in key.split(".") for name in fp32)
                state[key] = read(tensors, key, needed[key], torch.float32 if keep else dtype, deltas.get(key))
    missing = sorted(set(needed) - set(state))
    if missing:
        raise ModelError(f"{folder} lacks {len(missing)} tensors, {missing[0]} among them; fetch the model again.")
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def read(tensors: Any, key: str, like: torch.Tensor, dtype: torch.dtype, delta: Delta | None = None) -> torch.Tensor:
    """A tensor of a safetensors file, or the part of it that a ``DTensor`` holds here; with ``delta()`` added, in float32."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset as local_part

    change = delta() if delta else None
    if not isinstance(like, DTensor):
        whole: torch.Tensor = tensors.get_tensor(key)
        return (whole if change is None else whole.float() + change.view_as(whole)).to(dtype)
    sizes, starts = local_part(like.shape, like.device_mesh, like.placements)
    where = [slice(a, a + n) for a, n in zip(starts, sizes, strict=True)]
    dim, packed = getattr(like, "packed", (0, (like.shape[0],)))
    pieces, start = [], 0
    for size in packed:  # parts that lie one behind the other are divided each for itself
        if len(packed) > 1:
            one = size // like.device_mesh.size()
            first = start + like.device_mesh.get_local_rank() * one
            where[dim] = slice(first, first + one)
        piece = tensors.get_slice(key)[tuple(where)]
        pieces.append(piece if change is None else piece.float() + change[tuple(where)])
        start += size
    part = torch.cat(pieces, dim=dim)
    # a slice would hold the whole
    own = part.to(like.device_mesh.device_type, dtype).clone(memory_format=torch.contiguous_format)
    made: torch.Tensor = DTensor.from_local(
        own, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return made
