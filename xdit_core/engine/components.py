"""Load the components of a pipeline other than its denoisers, and check that each is complete.

Their libraries fill tensors that a checkpoint lacks with random numbers and only warn; the user would see a picture of
noise.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from xdit_core.checkpoints.model_facts import INDEX
from xdit_core.checkpoints.weights import read_header, read_json, weight_files
from xdit_core.errors import ModelError
from xdit_core.model_spec import ModelSpec
from xdit_core.observe.observer import Observer
from xdit_core.observe.status import Phase, Status


def load_components(
    folder: Path,
    index: Mapping[str, Any],
    dtype: torch.dtype,
    but: Mapping[str, Any],
    observer: Observer,
) -> dict[str, nn.Module]:
    """Load the models that ``model_index.json`` lists, by name; the pipeline loads components without weights.

    Args:
        but: components that are not loaded.
        observer: told which one is being loaded.

    Raises:
        ModelError: one cannot be read, or is not complete.
    """
    models = {}
    for name, entry in index.items():
        if name not in but and (cls := model_class(entry)) is not None:
            observer.status(Status(Phase.LOADING, f"the model: {name}"))
            models[name] = load_model(cls, folder / name, entry[0], dtype)
    return models


def load_again(folder: Path, name: str, dtype: torch.dtype) -> nn.Module:
    """Load one of these models once more.

    Raises:
        ModelError: it cannot be read, or is none that is loaded by itself.
    """
    entry = read_json(folder / INDEX)[name]
    cls = model_class(entry)
    if cls is None:
        raise ModelError(f"{folder / name} cannot be read again, so its LoRAs stay as they are; make a new Engine.")
    return load_model(cls, folder / name, entry[0], dtype)


def model_class(entry: Any) -> Any:
    """The class of a model that ``model_index.json`` names, None if the entry is none of diffusers or transformers."""
    import diffusers
    import transformers

    libraries = {"diffusers": diffusers, "transformers": transformers}
    if not isinstance(entry, list) or entry[0] not in libraries:
        return None
    cls = getattr(libraries[entry[0]], entry[1], None)
    is_model = isinstance(cls, type) and issubclass(cls, (diffusers.ModelMixin, transformers.PreTrainedModel))
    return cls if is_model else None


def load_model(cls: Any, folder: Path, library: str, dtype: torch.dtype) -> nn.Module:
    """Load a model with its library's ``from_pretrained``, as a pipeline would.

    Raises:
        ModelError: the model cannot be read, or tensors are missing or have another shape.
    """
    words: dict[str, Any] = (
        {"torch_dtype": dtype} if library == "diffusers" else {"dtype": dtype, "ignore_mismatched_sizes": True}
    )
    words |= {"output_loading_info": True, "local_files_only": True, "use_safetensors": True}
    try:
        model, report = cls.from_pretrained(folder, **words)
    except Exception as error:  # a damaged config or file can make a constructor raise anything
        other = re.search(r"because (\S+) expected shape (.+?), but got (.+?)\. ", str(error))
        if other:
            raise wrong_shape(folder, library, other[1], numbers(other[3]), numbers(other[2])) from error
        raise ModelError(
            f"{folder} cannot be loaded as the {cls.__name__} of its config.json: {first_line(error)}; fetch the model "
            "again."
        ) from error
    for name, stored, wanted in sorted(report["mismatched_keys"]):
        raise wrong_shape(folder, library, name, tuple(stored), tuple(wanted))
    if report["missing_keys"]:
        raise lacking(folder, set(report["missing_keys"]))
    loaded: nn.Module = model
    return loaded


def check_filled(folder: Path, model: nn.Module) -> None:
    """Check that every tensor has values.

    Raises:
        ModelError: some tensors are still on the meta device.
    """
    missing = {name for name, p in [*model.named_parameters(), *model.named_buffers()] if p.is_meta}
    if missing:
        raise lacking(folder, missing)


def first_line(error: Exception) -> str:
    """Return the first line of a library's error."""
    text = str(error).strip()
    return text.splitlines()[0][:300].rstrip(".") if text else type(error).__name__


def numbers(text: str) -> tuple[int, ...]:
    """Return the numbers in a shape that is given as text."""
    return tuple(int(n) for n in re.findall(r"\d+", text))


def lacking(folder: Path | str, names: set[str]) -> ModelError:
    """Make the error for missing tensors."""
    first = sorted(names)
    more = f" and {len(first) - 5} more" if len(first) > 5 else ""
    return ModelError(
        f"{folder} lacks {len(first)} tensor{'s' if len(first) > 1 else ''} that its config.json asks for: "
        f"{', '.join(first[:5])}{more}; fetch the model again."
    )


def wrong_shape(folder: Path, library: str, name: str, stored: tuple[int, ...], wanted: tuple[int, ...]) -> ModelError:
    """The error for a tensor of another shape than its model has."""
    files = weight_files(folder, library)
    file = next((file for file in files if name in read_header(file)), folder)
    return another_shape(str(file), name, stored, wanted)


def another_shape(origin: str, name: str, stored: tuple[int, ...], wanted: tuple[int, ...]) -> ModelError:
    """The error for a tensor of another shape than its model has."""
    return ModelError(
        f"{name} in {origin} has the shape {list(stored)}, and the config.json beside it asks for {list(wanted)}; "
        "the files belong to different models, fetch the model again."
    )


def denoisers_of(pipe: Any, spec: ModelSpec) -> dict[str, Any]:
    """Return the denoisers of the pipeline by name."""
    return {name: part for name in spec.checkpoint.denoisers if (part := getattr(pipe, name, None)) is not None}
