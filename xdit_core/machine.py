"""What this machine has, found without torch: the launcher must answer before torch could be imported."""

from __future__ import annotations

import ctypes
import os


def cuda_devices() -> int:
    """Number of NVIDIA GPUs that a process started here would see; 0 without the driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def cuda_capability() -> tuple[int, int] | None:
    """Compute capability of the first GPU, such as ``(9, 0)``; None without one."""
    if not cuda_devices():
        return None
    driver, major, minor = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(0), ctypes.c_int(0)
    for value, attribute in ((major, 75), (minor, 76)):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
        if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, 0) != 0:
            return None
    return major.value, minor.value


def cores() -> int:
    """CPU cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        return os.cpu_count() or 1
