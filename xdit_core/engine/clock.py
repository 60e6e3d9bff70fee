"""When the phases of a call of the pipeline began and ended."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch

Phases = Mapping[str, tuple[float, float]]


class Clock:
    """The moments of one call of the pipeline, in seconds of ``time.perf_counter``.

    Args:
        device: where the denoiser runs; a GPU is waited for at each moment.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda, self._marks = device.type == "cuda", dict[str, float]()

    def start(self) -> None:
        """A call of the pipeline begins."""
        self._marks = {"start": time.perf_counter()}

    def has(self, name: str) -> bool:
        """Whether a moment was noted in this call."""
        return name in self._marks

    def mark(self, *names: str) -> None:
        """Note this moment under names."""
        if self._cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        self._marks |= dict.fromkeys(names, now)

    def phases(self) -> dict[str, tuple[float, float]]:
        """Return begin and end of ``encode``, ``denoise`` and ``decode``."""
        end, start = time.perf_counter(), self._marks["start"]
        encoded, denoised = self._marks.get("encoded", start), self._marks.get("denoised", end)
        return {"encode": (start, encoded), "denoise": (encoded, denoised), "decode": (denoised, end)}


def seconds_of(phases: Phases, apart: Mapping[str, float]) -> dict[str, float]:
    """Return the seconds of each phase, and of what strategies time themselves; the sum is the wall time.

    Args:
        apart: seconds within ``denoise`` that are shown by themselves, by name.
    """
    seconds = {name: end - start for name, (start, end) in phases.items()}
    denoise = seconds["denoise"] - sum(apart.values())
    return {"encode": seconds["encode"], **apart, "denoise": denoise, "decode": seconds["decode"]}
