"""Tiny pipelines with random weights, from the real diffusers classes; one function for each model, by the adapter's
name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from helpers.models import tiny_images, tiny_videos


def saved(name: str, folder: Path, **options: Any) -> str:
    """A tiny pipeline on disk."""
    make = getattr(tiny_images, name, None) or getattr(tiny_videos, name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = make(**options)
    pipe.save_pretrained(folder)
    if getattr(
        pipe, "labels", None
    ):  # published checkpoints list the names of their classes, diffusers does not save them
        index = folder / "model_index.json"
        names = {str(i): name for name, i in pipe.labels.items()}
        index.write_text(json.dumps({**json.loads(index.read_text()), "id2label": names}))
    return str(folder)
