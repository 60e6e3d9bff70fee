"""What this machine has, found without torch: the launcher must answer before torch could be imported."""

from __future__ import annotations

import os
from pathlib import Path


def cuda_devices() -> int:
    """Number of NVIDIA GPUs that a process started here would see; 0 without the driver."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([v for v in visible.split(",") if v.strip() and v.strip() != "-1"])
    folder = Path("/proc/driver/nvidia/gpus")
    try:
        return len(list(folder.iterdir())) if folder.is_dir() else 0
    except OSError:
        return 0


def cores() -> int:
    """CPU cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        return os.cpu_count() or 1
