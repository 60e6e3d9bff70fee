"""Find out what this machine has. Without torch, because the launcher must answer before torch could be imported."""

from __future__ import annotations

import ctypes
import math
import os
import socket
from collections.abc import Mapping
from pathlib import Path

from xdit_core.errors import UsageError

BACKEND_VARIABLE = "XDIT_BACKEND"  # of the environment: what carries tensors between GPUs, see `gpu_backend`
SHARING = ("gloo", "nccl-shared")  # the backends with which several ranks may share a GPU
HOST_VARIABLE = "XDIT_HOST"  # of the environment: the name by which the user knows this machine


def host_name() -> str:
    """The name of this machine, as the user calls it."""
    return os.environ.get(HOST_VARIABLE) or socket.gethostname()


def cuda_devices() -> int:
    """The number of NVIDIA GPUs that a process started here would see; 0 without the driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def gpu_backend(environment: Mapping[str, str] | None = None) -> str:
    """What carries tensors between GPUs: ``nccl``, or ``gloo`` or ``nccl-shared``, with which ranks may share a GPU.

    Args:
        environment: by default this process's.

    Raises:
        UsageError: ``XDIT_BACKEND`` is something else.
    """
    name = (os.environ if environment is None else environment).get(BACKEND_VARIABLE) or "nccl"
    if name not in ("nccl", *SHARING):
        raise UsageError(f"{BACKEND_VARIABLE}={name} is not known; set it to gloo or nccl-shared, or leave it out.")
    return name


def cuda_capability() -> tuple[int, int] | None:
    """The compute capability of the first GPU, such as ``(9, 0)``; None without a GPU."""
    if not cuda_devices():
        return None
    driver, major, minor = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(0), ctypes.c_int(0)
    for value, attribute in ((major, 75), (minor, 76)):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
        if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, 0) != 0:
            return None
    return major.value, minor.value


def cores(root: Path = Path("/")) -> int:
    """The number of CPU cores that this process may use, within the limit of its container.

    Args:
        root: of the file system that holds the limits.
    """
    try:
        bound = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        bound = os.cpu_count() or 1
    limit = cpu_limit(root)
    return bound if limit is None else max(1, min(bound, math.ceil(limit)))


def cpu_limit(root: Path) -> float | None:
    """How many cores the control groups of this process leave it, None without a limit."""
    groups = root / "sys/fs/cgroup"
    limits = []
    for line in read_text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = groups if not controllers else groups / "cpu"
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):  # the smallest of all groups around it counts
            if folder.is_relative_to(top):
                limits.append(limit_of(folder))
    return min((x for x in limits if x is not None), default=None)


def limit_of(folder: Path) -> float | None:
    """The limit of one control group of version 2 or 1 in cores, None without a limit."""
    words = read_text(folder / "cpu.max").split() or [
        read_text(folder / name).strip() for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")
    ]
    try:
        quota, period = (float(word) for word in words[:2])
    except ValueError:  # "max", or no such files
        return None
    return quota / period if quota > 0 and period > 0 else None


def read_text(path: Path) -> str:
    """The text of a small file, "" if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def threads(together: int, environment: Mapping[str, str] | None = None) -> int:
    """The number of CPU threads of each process: ``OMP_NUM_THREADS`` if the user set it, else its share of the cores.

    Args:
        together: processes that share this machine.
        environment: by default this process's.
    """
    variables = os.environ if environment is None else environment
    text = variables.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # a list is for nested levels
    by_torchrun = text == "1" and "TORCHELASTIC_RUN_ID" in variables  # which sets it where the user did not
    if text.isdecimal() and int(text) > 0 and not by_torchrun:
        return int(text)
    return max(1, cores() // together)
