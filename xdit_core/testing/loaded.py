"""Copies of encoders and VAEs that were loaded before: a worker of the pool loads those of a checkpoint once, because
that takes their libraries a third of the time of a comparison."""

from __future__ import annotations

import copy
from collections import OrderedDict
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from xdit_core.engine import components

MOST = 12  # models that are kept


def keep_loaded_models() -> None:
    """From now on give copies of models that this process has loaded before, while their files are as they were."""
    kept: OrderedDict[Any, nn.Module] = OrderedDict()
    load = components.load_model

    def load_model(cls: Any, folder: Path, library: str, dtype: torch.dtype) -> nn.Module:
        """As ``components.load_model``."""
        key = (cls, folder, library, dtype, state_of(folder))
        if key not in kept:
            kept[key] = load(cls, folder, library, dtype)
            if len(kept) > MOST:
                kept.popitem(last=False)
        kept.move_to_end(key)
        return copy.deepcopy(kept[key])

    mock.patch.object(components, "load_model", load_model).start()


def state_of(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Name, size and time of the last change of each file of a folder."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return tuple((file.name, (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files)
