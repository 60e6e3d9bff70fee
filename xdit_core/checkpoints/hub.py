"""Find a checkpoint: in a folder, in the local hub cache, or on the hub itself. Without torch."""

from __future__ import annotations

import json
import os
from pathlib import Path

from xdit_core.errors import ModelError
from xdit_core.filesystem import user_path
from xdit_core.model_spec import Checkpoint, ModelSpec
from xdit_core.settings import ModelSettings

# Stands for whatever adapter fits the checkpoint that model.path names.
AUTO = ModelSpec("auto", Checkpoint(pipelines=()))
LORA_FILE = "pytorch_lora_weights.safetensors"  # as diffusers writes it


def looks_like_folder(path: str) -> bool:
    """Whether a text means a folder: ``org/name`` is a hub id unless there is such a folder, all else is a folder."""
    return path.startswith((".", "/", "~", "\\")) or path.count("/") != 1 or os.path.isdir(path)


def locate_lora(source: str, given: str) -> Path:
    """The local file of a LoRA that is fetched from the hub if it is not on this machine.

    Args:
        source: a hub id ``owner/name``, which stands for its `LORA_FILE`, or with the name of a file behind it.
        given: what has named it, for messages.

    Raises:
        ModelError: it is no hub id, there is no such file, or the hub is out of reach.
    """
    owner, _, rest = source.partition("/")
    name, _, file = rest.partition("/")
    form = "owner/name/FILE.safetensors"
    if not all(part and part[0] not in ".~" for part in (owner, name)) or ".." in file.split("/"):
        raise ModelError(f"{given}: there is no file or folder {source}; give one, or a hub id such as {form}.")
    from huggingface_hub import hf_hub_download  # slow to import, and most runs do not need it

    try:
        return Path(hf_hub_download(f"{owner}/{name}", file or LORA_FILE))
    except Exception as error:  # the hub client raises many unrelated classes
        reason = next(iter(str(error).strip().splitlines()), "no answer")[:160]
        raise ModelError(
            f"{given}: there is no file or folder {source}, and neither the local hub cache nor the hub has "
            f"{file or LORA_FILE} of {owner}/{name} ({type(error).__name__}: {reason}); give a file, or a hub id such "
            f"as {form}."
        ) from error


def on_hub(spec: ModelSpec, settings: ModelSettings) -> bool:
    """Whether the checkpoint is named by a hub id, and not by a folder or as part of a package."""
    source = settings.path or ("" if spec.checkpoint.path else spec.checkpoint.hub)
    return bool(source) and not looks_like_folder(source)


def locate(spec: ModelSpec, settings: ModelSettings, fetch: bool = True, weights: bool = True) -> Path:
    """The local folder of the checkpoint, which is fetched from the hub if it is not on this machine.

    Args:
        fetch: ask the hub; otherwise look in its local cache only.
        weights: fetch everything that a run needs; otherwise what a plan needs, which are JSON files.

    Raises:
        ModelError: the folder does not exist, or the hub is out of reach; says what was tried.
    """
    if settings.path is None and spec.checkpoint.path:
        if not Path(spec.checkpoint.path).is_dir():
            raise ModelError(
                f"the bundled checkpoint of model={spec.name} is missing; install the package again, or give "
                "model.path=DIR."
            )
        return Path(spec.checkpoint.path)
    source = settings.path or spec.checkpoint.hub
    if not source:
        raise ModelError(f"model={spec.name} needs a checkpoint; give its folder or hub id as model.path=.")
    if looks_like_folder(source):
        return user_path(source, "model.path=").resolve()
    from huggingface_hub import snapshot_download  # slow to import, and most runs do not need it

    try:
        where = {"revision": settings.revision, "cache_dir": settings.download_dir, "local_files_only": not fetch}
        folder = Path(snapshot_download(source, allow_patterns=["model_index.json"], **where))
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        wanted = [name for name, entry in index.items() if isinstance(entry, list) and entry and entry[0]]
        ends = (
            ["json", "txt", "model", "safetensors", *(["py"] if settings.trust_remote_code else [])]
            if weights
            else ["json"]
        )
        snapshot_download(
            source,
            allow_patterns=[f"{name}/*.{end}" for name in wanted for end in ends],
            ignore_patterns=["*.fp16*", "*.bf16*", "*.non_ema*"],
            **where,
        )
        return folder
    except Exception as error:  # the hub client raises many unrelated classes for a checkpoint that is not available
        reason = next(iter(str(error).strip().splitlines()), "no answer")[:160]
        raise ModelError(
            f"model={spec.name} was looked for as {source} in the local hub cache and on the hub, without success, "
            f"and there is no such folder here ({type(error).__name__}: {reason}); give a local folder with "
            "model.path=DIR, or try the bundled model=emoji."
        ) from error
