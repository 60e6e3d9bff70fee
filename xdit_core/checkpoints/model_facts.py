"""Read what a plan needs from a checkpoint folder, without torch: JSON files and safetensors headers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from xdit_core.checkpoints.weights import check_weights, read_json, weight_files
from xdit_core.errors import ModelError, PluginFailed
from xdit_core.model_spec import ModelSpec
from xdit_core.records import ModelFacts

INDEX = "model_index.json"
MOST_PIXELS = 65_536  # a side of a picture


def pipeline_class(folder: Path) -> str:
    """The name of the pipeline class that a folder holds.

    Raises:
        ModelError: no such folder, or no pipeline.
    """
    if not folder.is_dir():
        raise ModelError(f"model.path={folder} does not exist; give the folder that holds {INDEX}.")
    if not (folder / INDEX).is_file():
        raise ModelError(
            f"model.path={folder} is not a diffusers pipeline: it has no {INDEX}; give the folder that has one."
        )
    return str(read_json(folder / INDEX).get("_class_name", "?"))


def open_checkpoint(spec: ModelSpec, folder: Path, weights: bool = True) -> dict[str, Any]:
    """Check that a folder holds a diffusers pipeline that fits the adapter.

    Args:
        weights: the weights must be there; without it they may be missing, as where only the JSON files were fetched.

    Returns:
        The config of each component by name; ``_index`` is ``model_index.json``.

    Raises:
        ModelError: no such folder, no pipeline, a pipeline of another class, damaged weights.
    """
    pipeline, index = pipeline_class(folder), read_json(folder / INDEX)
    if pipeline not in spec.checkpoint.pipelines:
        wanted = " or ".join(spec.checkpoint.pipelines)
        raise ModelError(
            f"{folder} holds a {pipeline} but model={spec.name} needs a {wanted}; choose the model that fits."
        )
    configs: dict[str, Any] = {"_index": index}
    for name, library in components(folder, index).items():
        component = folder / name
        if not component.is_dir():
            raise ModelError(f"{component} is missing though {INDEX} lists it; fetch the model again.")
        config, scheduler = component / "config.json", component / "scheduler_config.json"
        if config.is_file() or scheduler.is_file():
            configs[name] = read_json(config if config.is_file() else scheduler)
        has_weights = weights or bool(weight_files(component, library))
        model = configs[name] if config.is_file() else {}
        check_layers(config, model, check_weights(component, library, model) if has_weights else 0)
    if spec.checkpoint.denoiser not in configs:
        raise ModelError(
            f"{folder} has no {spec.checkpoint.denoiser}/config.json; model={spec.name} cannot run without it."
        )
    return configs


def check_layers(file: Path, config: Mapping[str, Any], tensors: int) -> None:
    """Refuse numbers of layers that cannot fit any weights.

    Libraries take a number below 0 for none, and build a huge number until memory runs out.

    Args:
        file: of the config.
        tensors: how many the weights beside it have, 0 if they are not there.

    Raises:
        ModelError: names the number.
    """
    for key, value in config.items():
        counts = key == "layers_per_block" or (key.startswith(("num_", "n_")) and key.endswith("layers"))
        if not counts or not isinstance(value, int):
            continue
        if key in ("num_layers", "num_hidden_layers"):
            natural(value, str(file), key)
        if tensors and value > tensors:
            raise ModelError(
                f"{file} says {key}={value}, but the weights beside it are {tensors} tensors, too few for so many "
                "layers; fetch the model again."
            )


def components(folder: Path, index: Mapping[str, Any]) -> dict[str, str]:
    """The components that ``model_index.json`` lists and that are not null, each with the library of its class.

    Raises:
        ModelError: an entry is not a pair of names.
    """
    libraries = {}
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list) or entry[:1] == [None]:
            continue
        if len(entry) != 2 or not all(isinstance(word, str) for word in entry):
            raise ModelError(
                f"{folder / INDEX} has {name}={entry}, which is not a library and a class such as ['diffusers', "
                "'AutoencoderKL']; fetch it again."
            )
        libraries[name] = entry[0]
    return libraries


def config_keys(spec: ModelSpec) -> Iterator[tuple[str, str]]:
    """The keys of the denoiser's config that an adapter names, each after the field that names it."""
    if spec.trunk.blocks:
        yield "trunk.heads", spec.trunk.heads
    for i, part in enumerate(spec.trunk.blocks):
        yield f"trunk.blocks[{i}].count", part.count
    if spec.latents.patch_size:
        yield "latents.patch_size", spec.latents.patch_size


def check_config(spec: ModelSpec, config: Mapping[str, Any]) -> None:
    """Check that the denoiser's config has numbers above 0 under the keys that the adapter names.

    Raises:
        ModelError: it lacks one, or has something else there.
    """
    file = f"{spec.checkpoint.denoiser}/config.json"
    for field, key in config_keys(spec):
        if key not in config:
            raise ModelError(
                f"{file} has no {key}, which {spec.owner or spec.name} names as {field}; choose the model that fits "
                "this checkpoint, or correct the adapter."
            )
        value = config[key]
        several = field == "latents.patch_size" and isinstance(value, (list, tuple)) and value
        for number in value if several else (value,):
            natural(number, file, key)


def natural(value: Any, file: str, key: str) -> int:
    """A whole number above 0.

    Raises:
        ModelError: it is something else; names the file and the key.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        shown = str(value)[:40]
        raise ModelError(
            f"{file} has {key}={shown}, where a whole number above 0 is expected; fetch the model's JSON files again."
        )
    return value


@contextmanager
def describing(spec: ModelSpec) -> Iterator[None]:
    """Turn errors of an adapter that reads the configs of a checkpoint into a `ModelError`; they may hold anything."""
    try:
        yield
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, ArithmeticError) as error:
        raise ModelError(
            f"model={spec.name} cannot read the config files of this checkpoint ({type(error).__name__}: "
            f"{str(error)[:200]}); fetch its JSON files again, or choose the model that fits."
        ) from error
    except PluginFailed as error:
        text = str(error).removesuffix(".")
        raise PluginFailed(
            f"{text}; unless it is a mistake there, the config files of this checkpoint are damaged: fetch them again."
        ) from error


def fingerprints(paths: Iterable[str]) -> tuple[str, ...]:
    """Digests of the contents of files, or of the weights in folders."""
    digests = []
    for path in map(Path, paths):
        digest = hashlib.sha256()
        for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
        digests.append(digest.hexdigest()[:16])
    return tuple(digests)


def latent_factor(configs: Mapping[str, Any]) -> int:
    """How many pixels a side one latent element covers, as the diffusers image pipelines compute it.

    Raises:
        ModelError: the VAE's config lists no channels.
    """
    channels = configs.get("vae", {}).get("block_out_channels", (0,) * 4)
    if not isinstance(channels, (list, tuple)) or not 0 < len(channels) <= 16:
        raise ModelError(
            f"vae/config.json has block_out_channels={str(channels)[:40]}, where a list of numbers is expected; fetch "
            "the model's JSON files again."
        )
    return int(2 ** (len(channels) - 1))


def default_size(denoiser: Mapping[str, Any], configs: Mapping[str, Any]) -> int:
    """The pixels a side that the pipeline itself would choose, from the config of the denoiser and all configs."""
    size = denoiser.get("sample_size", 128)
    side = (natural(size, "config.json", "sample_size") if isinstance(size, int) else 128) * latent_factor(configs)
    if side > MOST_PIXELS:
        raise ModelError(
            f"config.json has sample_size={size}, which would be pictures of {side} pixels a side; fetch the JSON "
            "files again."
        )
    return side


def facts(spec: ModelSpec, configs: Mapping[str, Any], request: Mapping[str, Any]) -> ModelFacts:
    """Compute what the plan needs to know of the model.

    Args:
        configs: the JSON files of the components.
        request: the shared settings, and the pipeline's own ``call.*``.

    Raises:
        ModelError: the configs lack a value, or hold a wrong one.
    """
    config, trunk, latents = configs[spec.checkpoint.denoiser], spec.trunk, spec.latents
    uses_cfg = spec.request.uses_cfg
    check_config(spec, config)
    with describing(spec):
        patch_frames, patch = latents.patch_sizes(config)
        pixels = latents.token_pixels(configs) if latents.token_pixels else latent_factor(configs) * patch
        step = latents.frame_step(configs) if latents.frame_step else 0
        latent_frames = ((request.get("frames") or 1) - 1) // step + 1 if step and not trunk.stream.frames else 1
        return ModelFacts(
            model=spec.name,
            heads=config[trunk.heads] if trunk.blocks else 0,
            blocks=sum(config[part.count] for part in trunk.blocks),
            rows=(request.get("height") or 0) // pixels,
            columns=(request.get("width") or 0) // pixels,
            frames=-(-latent_frames // patch_frames),
            text_tokens=spec.text.tokens(configs, request) if spec.text.tokens else 0,
            pixels_per_token=pixels,
            has_tp_plan=trunk.tp_plan is not None,
            uses_cfg=uses_cfg(request) if uses_cfg else (request.get("guidance") or 0.0) > 1.0,
            frame_step=step,
            row_unit=latents.row_unit(config) if latents.row_unit else 1,
        )
