"""Load a diffusers pipeline; of the denoiser only the blocks that this rank holds are read and allocated.

The denoiser is always read here: diffusers' own loader fills tensors that a checkpoint lacks with random numbers and a warning.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from xdit_core.checkpoint import INDEX, read_json, weight_files
from xdit_core.errors import ModelError
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
) -> Any:
    """The pipeline of a local checkpoint folder.

    Args:
        spec: the model adapter's record.
        folder: has ``model_index.json``.
        blocks: indices of the blocks to hold.
        changes: what strategies do to the denoiser while its parameters are on the meta device.
        trust_remote_code: Python code that lies in the folder may run.

    Raises:
        ModelError: a component cannot be read.
    """
    import diffusers

    index = read_json(folder / INDEX)
    cls = getattr(diffusers, index["_class_name"])
    components: dict[str, Any] = absent_components(cls, index)
    for name in spec.denoisers:
        if name not in components and name in index:
            components[name] = load_part(spec, folder / name, index[name][1], blocks, dtype, changes)
    more = {"trust_remote_code": True} if trust_remote_code else {}
    try:
        pipe = cls.from_pretrained(folder, dtype=dtype, local_files_only=True, **more, **components)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{folder} cannot be loaded as {index['_class_name']}: {reason}") from error
    return pipe.to(device)


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
    spec: ModelSpec, folder: Path, class_name: str, blocks: range, dtype: torch.dtype, changes: Sequence[Change] = ()
) -> nn.Module:
    """The denoiser with ``Absent`` in place of the blocks that other stages hold; of a sharded parameter only the shard is read.

    Raises:
        ModelError: the checkpoint lacks a tensor that this rank needs.
    """
    import diffusers
    from accelerate import init_empty_weights
    from safetensors import safe_open

    cls = getattr(diffusers, class_name)
    with init_empty_weights():  # parameters on the meta device, computed buffers real
        model: nn.Module = cls.from_config(cls.load_config(folder))
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
    fp32 = tuple(getattr(cls, "_keep_in_fp32_modules", None) or ())
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as tensors:
            for key in needed.keys() & set(tensors.keys()):
                keep = any(name in key.split(".") for name in fp32)
                state[key] = read(tensors, key, needed[key], torch.float32 if keep else dtype)
    missing = sorted(set(needed) - set(state))
    if missing:
        raise ModelError(f"{folder} lacks {len(missing)} tensors, {missing[0]} among them; fetch the model again.")
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def read(tensors: Any, key: str, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of a safetensors file, or the part of it that a ``DTensor`` holds here."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset as local_part

    if not isinstance(like, DTensor):
        whole: torch.Tensor = tensors.get_tensor(key).to(dtype)
        return whole
    sizes, starts = local_part(like.shape, like.device_mesh, like.placements)
    where = [slice(a, a + n) for a, n in zip(starts, sizes, strict=True)]
    dim, packed = getattr(like, "packed", (0, (like.shape[0],)))
    pieces, start = [], 0
    for size in packed:  # parts that lie one behind the other are divided each for itself
        if len(packed) > 1:
            one = size // like.device_mesh.size()
            first = start + like.device_mesh.get_local_rank() * one
            where[dim] = slice(first, first + one)
        pieces.append(tensors.get_slice(key)[tuple(where)])
        start += size
    part = torch.cat(pieces, dim=dim)
    own = part.to(like.device_mesh.device_type, dtype).clone(
        memory_format=torch.contiguous_format
    )  # a slice would hold the whole
    made: torch.Tensor = DTensor.from_local(
        own, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return made
