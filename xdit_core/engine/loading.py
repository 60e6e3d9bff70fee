"""Load a pipeline onto a rank; of the denoiser, only the blocks that this rank holds are read and allocated.

The same steps run for a folder and for a pipeline that the user has loaded. First the denoiser is made without values
(`Part.make`), with placeholders for the blocks of other ranks. Then strategies change it, while parameters have shapes
only. Then the tensors are read (`Part.tensors`), LoRAs are added, and each tensor is divided as its parameter says. The
loader of diffusers is not used, because it fills tensors that a checkpoint lacks with random numbers and only warns.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from xdit_core.checkpoints.model_facts import INDEX, components
from xdit_core.checkpoints.weights import read_json
from xdit_core.engine.components import another_shape, check_filled, first_line, lacking, load_again, load_components
from xdit_core.engine.lora.adapters import Delta, Deltas, read_loras, takers
from xdit_core.engine.tensors import FileTensors, ModuleTensors, Tensors, hollow, twin
from xdit_core.errors import ModelError
from xdit_core.model_spec import ModelSpec
from xdit_core.observe.observer import Observer
from xdit_core.observe.status import Phase, Status
from xdit_core.parallel.slices import TensorSlice, slice_of
from xdit_core.points.adapter_check import check_adapter
from xdit_core.points.trunk import Absent

Change = Callable[[nn.Module], None]
LOGGERS = ("diffusers", "transformers", "accelerate", "peft", "huggingface_hub")


@contextmanager
def quiet() -> Iterator[None]:
    """Silence libraries while a pipeline is loaded, and restore their settings afterwards."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    bars = [library for library in (diffusers_logging, transformers_logging) if library.is_progress_bar_enabled()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for name in LOGGERS:
                logging.getLogger(name).setLevel(logging.ERROR)
            for library in bars:
                library.disable_progress_bar()
            yield
        finally:
            for library in bars:
                library.enable_progress_bar()
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


@dataclass(frozen=True)
class Part:
    """A denoiser that will be loaded, or another model that a LoRA may change.

    Args:
        make: makes it with parameters on the meta device and real computed buffers.
        tensors: opens the source of its tensors.
        origin: name of that source, for messages.
    """

    make: Callable[[], nn.Module]
    tensors: Callable[[], AbstractContextManager[Tensors]]
    origin: str


@dataclass(frozen=True)
class Weights:
    """The weights of a loaded model that a LoRA may change.

    Args:
        part: the model as it was loaded, without LoRAs.
        shapes: each parameter of this rank without values, which says how it is divided, by its name in the checkpoint.
        parameters: the same with values.
        changed: names of those to which LoRAs were added.
    """

    part: Part
    shapes: Mapping[str, torch.Tensor]
    parameters: Mapping[str, nn.Parameter]
    changed: frozenset[str]


@dataclass(frozen=True)
class Loaded:
    """A loaded pipeline.

    Args:
        weights: of the models that a LoRA may change, by name; none if they cannot be read again.
    """

    pipe: Any
    weights: Mapping[str, Weights]


@quiet()
def load_pipeline(
    spec: ModelSpec,
    folder: Path,
    blocks: range,
    device: torch.device,
    dtype: torch.dtype,
    changes: Sequence[Change] = (),
    trust_remote_code: bool = False,
    loras: Mapping[str, float] = MappingProxyType({}),
    observer: Observer | None = None,
) -> Loaded:
    """Load the pipeline of a local checkpoint folder.

    Args:
        spec: the model adapter's record.
        folder: the folder with ``model_index.json``.
        blocks: indices of the blocks to hold.
        changes: transforms of strategies that run while parameters are on the meta device.
        trust_remote_code: whether Python code in the folder may run.
        loras: scale of each LoRA to add to the weights, by path.
        observer: told which component is being loaded.

    Raises:
        ModelError: a component cannot be read.
    """
    import diffusers

    observer = observer or Observer()
    index = read_json(folder / INDEX)
    cls = getattr(diffusers, index["_class_name"], None)
    if cls is None:
        raise ModelError(
            f"the installed diffusers has no {index['_class_name']}, which {folder} needs; install a newer one."
        )
    absent: dict[str, Any] = absent_components(cls, index)
    listed = components(folder, index)
    parts = {
        name: folder_part(folder, name, index[name][1], dtype) for name in spec.checkpoint.denoisers if name in listed
    }
    # the denoisers get their values last, because LoRA adapters name all blocks and are first put onto shapes
    shapes = {name: part.make() for name, part in parts.items()}
    models = load_components(folder, index, dtype, {**absent, **shapes}, observer)
    more = {"trust_remote_code": True} if trust_remote_code else {}
    try:
        pipe = cls.from_pretrained(folder, dtype=dtype, local_files_only=True, **more, **absent, **shapes, **models)
    except Exception as error:  # damaged files of tokenizers or schedulers can make their libraries raise anything
        raise ModelError(f"{folder} cannot be loaded as {index['_class_name']}: {first_line(error)}.") from error
    for name, component in pipe.components.items():
        if isinstance(component, nn.Module) and name not in parts:
            check_filled(folder / name, component)
    observer.status(Status(Phase.LOADING, f"the model: {', '.join(parts)}"))
    others = {}
    for name, model in takers(pipe).items():
        if name not in parts:
            make, tensors = partial(twin, twin(model, hollow), hollow), partial(reopened, folder, name, dtype)
            others[name] = Part(make, tensors, str(folder / name))
    return fill(pipe, spec, parts, others, shapes, blocks, device, changes, loras)


def reopened(folder: Path, name: str, dtype: torch.dtype) -> ModuleTensors:
    """Load a component of a folder once more, for its tensors."""
    return ModuleTensors(load_again(folder, name, dtype))


def folder_part(folder: Path, name: str, class_name: str, dtype: torch.dtype) -> Part:
    """Describe a denoiser whose tensors are in the files of a folder.

    Raises:
        ModelError: its class is not a model of diffusers.
    """
    import diffusers

    cls = getattr(diffusers, class_name, None)
    if not (isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin)):
        raise ModelError(
            f"{folder / INDEX} says that {name} is a {class_name}, which is no model of diffusers; fetch it again."
        )
    fp32 = getattr(cls, "_keep_in_fp32_modules", None) or ()
    fp32 = (fp32,) if isinstance(fp32, str) else tuple(fp32)
    where = folder / name
    return Part(partial(empty, class_name, where, dtype), partial(FileTensors, where, dtype, fp32), str(where))


def fill(
    pipe: Any,
    spec: ModelSpec,
    parts: Mapping[str, Part],
    others: Mapping[str, Part],
    shapes: Mapping[str, nn.Module],
    blocks: range,
    device: torch.device,
    changes: Sequence[Change],
    loras: Mapping[str, float],
) -> Loaded:
    """Replace the denoisers without values by denoisers with values, and add LoRAs to these and to other models.

    Args:
        parts, others: the denoisers, and the loaded models of the pipeline that LoRAs may change too.
        shapes: the denoisers without values, which get them.

    Raises:
        ModelError: a tensor is missing or has another shape; a LoRA does not fit.
    """
    everything = {**parts, **others}
    deltas = read_loras(pipe, {name: part.make() for name, part in everything.items()} if loras else {}, loras)
    needed: dict[str, Mapping[str, torch.Tensor]] = {}
    for name, part in parts.items():
        needed[name] = load_part(spec, part, shapes[name], blocks, changes, deltas.get(name, {}))
        pipe.register_modules(**{name: shapes[name]})
    for name in others:
        model, own = getattr(pipe, name), ModuleTensors(getattr(pipe, name))
        needed[name] = dict(model.named_parameters(remove_duplicate=False))
        for key, delta in deltas.get(name, {}).items():  # the memory may belong to the user's pipeline
            needed[name][key].data = read(own, key, needed[name][key], delta)
    pipe.to(device)
    weights = {}
    for name, part in everything.items():
        parameters = dict(getattr(pipe, name).named_parameters(remove_duplicate=False))
        weights[name] = Weights(part, needed[name], parameters, frozenset(deltas.get(name, {})))
    return Loaded(pipe, weights)


def empty(class_name: str, folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Make a denoiser with parameters on the meta device and real computed buffers, as diffusers does before reading.

    Args:
        dtype: dtype of those buffers and tables that do not choose one themselves.

    Raises:
        ModelError: its config does not describe it.
    """
    import diffusers
    from accelerate import init_empty_weights

    cls = getattr(diffusers, class_name)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with init_empty_weights():
            model: nn.Module = cls.from_config(cls.load_config(folder))
    except Exception as error:  # a damaged config can make a constructor raise anything
        raise ModelError(
            f"{folder}/config.json does not describe a {class_name} ({type(error).__name__}: {first_line(error)}); "
            "fetch it again."
        ) from error
    finally:
        torch.set_default_dtype(before)
    return model


def absent_components(cls: type[Any], index: Mapping[str, Any]) -> dict[str, None]:
    """Return null for components that the folder does not have, so that diffusers does not ask for them."""
    absent: dict[str, None] = {}
    for p in inspect.signature(cls.__init__).parameters.values():
        component = p.default is inspect.Parameter.empty or p.default is None
        entry = index.get(p.name)
        if p.name != "self" and (entry[0] is None if isinstance(entry, list) else component and p.name not in index):
            absent[p.name] = None
    return absent


def load_part(
    spec: ModelSpec, part: Part, model: nn.Module, blocks: range, changes: Sequence[Change], deltas: Deltas
) -> dict[str, torch.Tensor]:
    """Fill a denoiser, with ``Absent`` in place of the blocks that other stages hold; of a sharded parameter only the
    shard is read.

    Args:
        model: what the part makes, without values; it gets them.

    Returns:
        The tensors of the model without values, which say how they are divided, by name.

    Raises:
        ModelError: the adapter does not fit the denoiser; or the source lacks a tensor that this rank needs, or has one
            of another shape.
    """
    check_adapter(spec, model)
    start = 0
    for block_list in spec.trunk.blocks:
        length = 0
        for name in (block_list.attribute, *block_list.beside):
            modules: Any = getattr(model, name)
            length = len(modules)
            for i in range(length):
                if start + i not in blocks:
                    modules[i] = Absent(modules[i], spec.trunk.shared_submodules if start + i == 0 else ())
        start += length
    for change in changes:
        change(model)
    needed = {**model.state_dict(), **dict(model.named_parameters())}  # parameters know how they are divided
    state: dict[str, torch.Tensor] = {}
    with part.tensors() as tensors:
        names = set(tensors.names())
        missing = needed.keys() - names
        if missing:
            raise lacking(part.origin, missing)
        for name, like in needed.items():
            if tensors.shape(name) != (shape := slice_of(like).shape):
                raise another_shape(tensors.origin(name), name, tensors.shape(name), shape)
            state[name] = read(tensors, name, like, deltas.get(name))
        model.load_state_dict(state, strict=True, assign=True)
        replace_buffers(model, tensors)
    model.eval()
    return needed


def replace_buffers(model: nn.Module, tensors: Tensors) -> None:
    """Replace buffers that are not in checkpoints by those of a loaded module, which may have changed their dtype."""
    for name in dict(model.named_buffers()).keys() & set(tensors.computed()):
        holder, _, last = name.rpartition(".")
        model.get_submodule(holder)._buffers[last] = tensors.read(name)


def read(tensors: Tensors, name: str, like: torch.Tensor, delta: Delta | None = None) -> torch.Tensor:
    """Read a tensor, or the part of it that a parameter is, and add ``delta()`` in float32."""
    from torch.distributed.tensor import DTensor

    part, change = slice_of(like), delta() if delta else None
    if part == TensorSlice.whole(part.shape) and not isinstance(like, DTensor):
        whole = tensors.read(name)
        return (whole if change is None else whole.float() + change.view_as(whole)).to(tensors.dtype(name, whole.dtype))
    own = part.read(partial(tensors.read, name))
    dtype = tensors.dtype(name, own.dtype)
    if change is not None:
        own = own.float() + part.read(change.view(part.shape).__getitem__)
    # a slice would keep the whole tensor in memory
    own = own.to(dtype).clone(memory_format=torch.contiguous_format)
    if not isinstance(like, DTensor):
        return own
    made: torch.Tensor = DTensor.from_local(
        own.to(like.device_mesh.device_type),
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )
    return made
