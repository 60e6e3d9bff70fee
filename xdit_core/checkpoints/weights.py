"""Find and check the weight files in the folder of a component. Without torch."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xdit_core.errors import ModelError

SINGLE, INDEX = ".safetensors", ".safetensors.index.json"
FETCH = "fetch the model again"

# The name that each library gives its files, and in which order it looks for a single file and for an index of shards.
DIFFUSERS = ("diffusion_pytorch_model", (INDEX, SINGLE))
TRANSFORMERS = ("model", (SINGLE, INDEX))


def naming(library: str) -> Sequence[tuple[str, Sequence[str]]]:
    """Names of weight files in the order in which a library looks for them; those of both for an unknown library."""
    known = {"diffusers": (DIFFUSERS,), "transformers": (TRANSFORMERS,)}
    return known.get(library, (DIFFUSERS, TRANSFORMERS))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        ModelError: it cannot be read.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}; check the folder given as model.path.") from error
    except (ValueError, RecursionError) as error:
        reason = error if isinstance(error, ValueError) else "it is nested too deeply"
        raise ModelError(
            f"{path} is not valid JSON ({reason}); the download may be incomplete, fetch it again."
        ) from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds no JSON object; the download may be incomplete, fetch it again.")
    return value


def read_header(path: Path) -> dict[str, Mapping[str, Any]]:
    """Read the tensors of a safetensors file by name; this finds a truncated download before anything starts.

    Raises:
        ModelError: the file is shorter or longer than its header says, or has no header.
    """
    size = path.stat().st_size
    fix = "the file is damaged or was cut off, fetch it again"
    with path.open("rb") as file:
        first = file.read(8)
        if len(first) < 8:
            raise ModelError(f"{path} has {size} bytes and no safetensors header; {fix}.")
        (length,) = struct.unpack("<Q", first)
        if length > min(size, 100_000_000):
            raise ModelError(f"{path} has no readable safetensors header; {fix}.")
        try:
            header = json.loads(file.read(length))
            tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
            end = max((int(entry["data_offsets"][1]) for entry in tensors.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise ModelError(f"{path} has no readable safetensors header; {fix}.") from error
    if size != 8 + length + end:
        raise ModelError(f"{path} has {size} bytes but its header promises {8 + length + end}; {fix}.")
    return tensors


def weight_files(folder: Path, library: str = "") -> list[Path]:
    """The safetensors files that a library reads from the folder of a component; variants are left out.

    Args:
        library: ``diffusers``, ``transformers`` or another, as in ``model_index.json``.

    Raises:
        ModelError: a shard that the index names is missing, or is in another folder.
    """
    for stem, order in naming(library):
        for ending in order:
            file = folder / (stem + ending)
            if file.is_file():
                return [file] if ending == SINGLE else shards(file)
    return []


def shards(index: Path) -> list[Path]:
    """The files that an index of shards names.

    Raises:
        ModelError: it names none, one that is missing, or one outside its folder.
    """
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise ModelError(f"{index} has no weight_map that names the files of the weights; {FETCH}.")
    files = []
    for name in sorted({str(value) for value in named.values()}):
        if Path(name).name != name or name == ".." or "\\" in name:
            raise ModelError(
                f"{index} names {name}, which is not a file in its own folder; such an index is not to be trusted, "
                f"{FETCH}."
            )
        files.append(index.parent / name)
        if not files[-1].is_file():
            raise ModelError(f"{files[-1]} is missing though the index beside it names it; {FETCH}.")
    return files


def check_weights(folder: Path, library: str, config: Mapping[str, Any]) -> int:
    """Check the weight files of a component.

    Args:
        config: the component's ``config.json``, empty if it has none.

    Returns:
        The number of tensors that they hold.

    Raises:
        ModelError: they are quantized, damaged, missing, or can be read only by running what they contain.
    """
    refuse_quantized(folder, config)
    files = weight_files(folder, library)
    if not files and holds_a_model(config):
        raise ModelError(why_no_weights(folder, library))
    return sum(len(read_header(file)) for file in files)


def holds_a_model(config: Mapping[str, Any]) -> bool:
    """Whether a component with that ``config.json`` has weights: tokenizers and schedulers have none."""
    return bool(config.get("_class_name") or config.get("architectures"))


def refuse_quantized(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse quantized weights, since they mean nothing without their scales, and dividing those is not supported.

    Raises:
        ModelError: the config says that the weights are quantized.
    """
    quantization = config.get("quantization_config")
    if not quantization:
        return
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    raise ModelError(
        f"the weights in {folder} are quantized ({method or 'by an unnamed method'}), and only plain ones can be "
        "divided; take the checkpoint that is not quantized, or make one with diffusers: "
        f"pipe.{folder.name}.dequantize(), then pipe.save_pretrained(DIR)."
    )


def why_no_weights(folder: Path, library: str) -> str:
    """A sentence about what is in the folder of a component in place of weight files that its library reads."""
    wanted = " or ".join(stem + SINGLE for stem, _ in naming(library))
    pickles = sorted(file.name for end in ("bin", "pt", "pth", "ckpt") for file in folder.glob(f"*.{end}"))
    variants = sorted(file.name for file in folder.glob("*.safetensors"))
    if pickles:
        return (
            f"{folder} has its weights only as {pickles[0]}, a pickle, which can run any program when it is read; "
            f"convert the "
            'checkpoint to safetensors where you trust it: python -c "from diffusers import DiffusionPipeline as P; '
            f"P.from_pretrained('{folder.parent}').save_pretrained('NEW')\", and give model.path=NEW."
        )
    if variants:
        return f"{folder} holds {variants[0]} but no {wanted}; rename it, or {FETCH} without choosing a variant."
    return f"{folder} holds no {wanted}; {FETCH}."
