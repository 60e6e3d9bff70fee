"""Digest the contents of a checkpoint without reading all of it. Without torch."""

from __future__ import annotations

import hashlib
from pathlib import Path

from xdit_core.checkpoints.model_facts import INDEX, components
from xdit_core.checkpoints.weights import read_header, read_json, weight_files
from xdit_core.errors import ModelError

SAMPLE = 256  # bytes that are read in the middle of each tensor: another training leaves none of them as it was


def checkpoint_fingerprint(folder: Path) -> str | None:
    """A digest of the configurations, and of the name, size and a sample of every tensor.

    Args:
        folder: of a pipeline in diffusers' format.

    Returns:
        16 hex digits, the same wherever the folder lies; None if its files cannot be read.
    """
    digest = hashlib.sha256()
    try:
        for name, library in sorted(components(folder, read_json(folder / INDEX)).items()):
            for config in ("config.json", "scheduler_config.json"):
                if (folder / name / config).is_file():
                    digest.update(f"{name}/{config}\0".encode() + (folder / name / config).read_bytes())
            for file in weight_files(folder / name, library):
                digest.update(f"{name}/{file.name} {file.stat().st_size}\0".encode() + tensor_samples(file))
    except (OSError, ModelError):
        return None
    return digest.hexdigest()[:16]


def tensor_samples(path: Path) -> bytes:
    """Name, place and a few bytes of each tensor of a safetensors file, in the order in which they lie there.

    Raises:
        ModelError: it is not a safetensors file.
    """
    tensors = sorted((tuple(map(int, entry["data_offsets"])), name) for name, entry in read_header(path).items())
    samples = []
    with path.open("rb") as file:
        first = 8 + int.from_bytes(file.read(8), "little")
        for (start, end), name in tensors:
            file.seek(first + max(start, (start + end - SAMPLE) // 2))
            samples.append(f"{name} {start} {end}\0".encode() + file.read(min(SAMPLE, end - start)))
    return b"".join(samples)
