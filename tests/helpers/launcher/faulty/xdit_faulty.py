"""A strategy that fails on purpose, at a chosen rank and step; for the tests of the launcher."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from xdit_core import Built, Declaration, ModelFacts, Rank, UnsupportedCall, Wrap, hookimpl


@dataclass(frozen=True)
class Settings:
    """Settings of ``faulty``."""

    how: str = field(
        default="raise", metadata={"help": "raise, known, exit, kill, hang, collective, memory, limit or allocator"}
    )
    rank: int = 1
    step: int = 2


@hookimpl
def xdit_settings() -> type[Settings]:
    """``faulty.how``, ``.rank``, ``.step``."""
    return Settings


@hookimpl
def xdit_declare(settings: Settings, facts: ModelFacts) -> Declaration:
    """One wrap around the denoiser."""
    return Declaration(wraps=(Wrap("forward", "reuse"),))


@hookimpl
def xdit_build(settings: Settings, rank: Rank) -> Built:
    """Count the calls of the denoiser and fail at one."""
    calls = 0

    def wrap(inner: Any, call: Any) -> Any:
        nonlocal calls
        calls += 1
        if rank.mesh.rank == settings.rank and calls == settings.step:
            fail(settings.how)
        return inner(call)

    return Built(wraps={"forward/reuse": wrap})


def fail(how: str) -> None:
    """Fail, and leave a note of when."""
    Path("fault-time").write_text(str(time.time()))
    if how == "raise":
        raise ValueError("a number that is no number")
    if how == "known":
        raise UnsupportedCall("this cannot be honoured; leave it out.")
    if how == "exit":
        sys.exit(3)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "hang":
        time.sleep(600)
    if how == "collective":
        import torch.distributed as dist

        dist.barrier()  # in which no other rank takes part
    if how == "limit":
        import resource

        import torch

        used = psutil.Process().memory_info().vms
        resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), resource.RLIM_INFINITY))
        torch.ones(1 << 28)
    if how == "memory":
        raise MemoryError
    if how == "allocator":
        import torch

        torch.empty(1 << 55)
