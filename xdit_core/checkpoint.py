"""Read what a plan needs from a checkpoint folder, without torch: JSON files and safetensors headers."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from xdit_core.errors import ModelError
from xdit_core.records import Facts, ModelSpec

INDEX = "model_index.json"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ModelError: it cannot be read.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}; check the folder given as model.path.") from error
    except ValueError as error:
        raise ModelError(f"{path} is no JSON ({error}); the download may be incomplete, fetch it again.") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds no JSON object; the download may be incomplete, fetch it again.")
    return value


def check_safetensors(path: Path) -> None:
    """Compare a file's length with its header, so that a truncated download is found before anything starts.

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
            end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{path} has no readable safetensors header; {fix}.") from error
    if size != 8 + length + end:
        raise ModelError(f"{path} has {size} bytes but its header promises {8 + length + end}; {fix}.")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that diffusers and transformers would read from a component folder; variants are left alone.

    Raises:
        ModelError: a shard that the index names is missing, or a file is damaged.
    """
    files: list[Path] = []
    for stem in ("diffusion_pytorch_model", "model"):
        single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
        if single.is_file():
            files = [single]
        elif index.is_file():
            files = [folder / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
        if files:
            break
    for file in files:
        if not file.is_file():
            raise ModelError(f"{file} is missing though the index beside it names it; fetch the model again.")
        check_safetensors(file)
    return files


def pipeline_class(folder: Path) -> str:
    """Name of the class of pipelines that a folder holds.

    Raises:
        ModelError: no such folder, or no pipeline.
    """
    if not folder.is_dir():
        raise ModelError(f"model.path={folder} does not exist; give the folder that holds {INDEX}.")
    if not (folder / INDEX).is_file():
        raise ModelError(f"model.path={folder} is no diffusers pipeline: it has no {INDEX}; give the folder that has one.")
    return str(read_json(folder / INDEX).get("_class_name", "?"))


def open_checkpoint(spec: ModelSpec, folder: Path) -> dict[str, Any]:
    """Check that a folder holds a diffusers pipeline that fits the adapter.

    Returns:
        Component name to config, ``_index`` to ``model_index.json``.

    Raises:
        ModelError: no such folder, no pipeline, a pipeline of another class, damaged weights.
    """
    found, index = pipeline_class(folder), read_json(folder / INDEX)
    if found not in spec.pipelines:
        wanted = " or ".join(spec.pipelines)
        raise ModelError(f"{folder} holds a {found} but model={spec.name} needs a {wanted}; choose the model that fits.")
    configs: dict[str, Any] = {"_index": index}
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list) or not entry or entry[0] is None:
            continue
        component = folder / name
        if not component.is_dir():
            raise ModelError(f"{component} is missing though {INDEX} lists it; fetch the model again.")
        for config in ("config.json", "scheduler_config.json"):
            if (component / config).is_file():
                configs[name] = read_json(component / config)
        weight_files(component)
    if spec.denoiser not in configs:
        raise ModelError(f"{folder} has no {spec.denoiser}/config.json; model={spec.name} cannot run without it.")
    if not weight_files(folder / spec.denoiser):
        raise ModelError(f"{folder / spec.denoiser} holds no diffusion_pytorch_model.safetensors; fetch the model again.")
    return configs


def fingerprints(paths: Iterable[str]) -> tuple[str, ...]:
    """What tells the contents of files, or of the weights in folders, from those of others."""
    found = []
    for path in map(Path, paths):
        digest = hashlib.sha256()
        for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
        found.append(digest.hexdigest()[:16])
    return tuple(found)


def latent_factor(configs: Mapping[str, Any]) -> int:
    """Pixels a side of one latent element, as the diffusers image pipelines compute it."""
    return int(2 ** (len(configs.get("vae", {}).get("block_out_channels", (0,) * 4)) - 1))


def default_size(denoiser: Mapping[str, Any], configs: Mapping[str, Any]) -> int:
    """Pixels a side that the pipeline itself would take, from the denoiser's config and all configs."""
    size = denoiser.get("sample_size", 128)
    return (size if isinstance(size, int) else 128) * latent_factor(configs)


def facts(spec: ModelSpec, configs: Mapping[str, Any], asked: Mapping[str, Any]) -> Facts:
    """What the plan needs to know.

    Args:
        asked: the shared settings, and the pipeline's own ``call.*``.
    """
    config = configs[spec.denoiser]
    missing = [key for key in (spec.heads, spec.patch, *(b.count for b in spec.blocks)) if key and key not in config]
    if missing:
        raise ModelError(f"{spec.denoiser}/config.json has no {', '.join(missing)}; model={spec.name} cannot describe it.")
    patch_frames, patch = spec.patch_sizes(config)
    pixels = spec.token_pixels(configs) if spec.token_pixels else latent_factor(configs) * patch
    step = spec.frame_step(configs) if spec.frame_step else 0
    latent_frames = ((asked.get("frames") or 1) - 1) // step + 1 if step and not spec.stream.frames else 1
    return Facts(
        model=spec.name,
        heads=int(config[spec.heads]) if spec.heads else 0,
        blocks=sum(int(config[b.count]) for b in spec.blocks),
        rows=(asked.get("height") or 0) // pixels,
        columns=(asked.get("width") or 0) // pixels,
        frames=-(-latent_frames // patch_frames),
        text_tokens=spec.text_tokens(configs, asked) if spec.text_tokens else 0,
        pixels_per_token=pixels,
        matrices=spec.matrices is not None,
        guided=spec.guided(asked) if spec.guided else (asked.get("guidance") or 0.0) > 1.0,
        frame_step=step,
        row_unit=spec.row_unit(config) if spec.row_unit else 1,
    )
