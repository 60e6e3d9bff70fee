"""The attention kernel as a slot: torch's own ones, or flash-attn where it is installed.

FlashAttention: Dao 2023, arXiv:2307.08691 (version 2), Shah et al. 2024, arXiv:2407.08608 (version 3).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from types import MappingProxyType
from typing import TYPE_CHECKING

from xdit_core import EXACT, Built, Claim, Declaration, ModelFacts, Problem, Wrap, cuda_capability, hookimpl

if TYPE_CHECKING:
    from xdit_core import Plan, Rank


@dataclass(frozen=True)
class KernelNeeds:
    """What a kernel needs: compute capability (None: it runs on a CPU too), half precision, a package."""

    capability: tuple[int, int] | None
    half: bool = False
    package: str = ""


KERNELS: Mapping[str, KernelNeeds] = MappingProxyType(
    {
        "auto": KernelNeeds(None),
        "flash": KernelNeeds(None),  # on a CPU torch has one of its own, in any precision
        "math": KernelNeeds(None),
        "efficient": KernelNeeds((5, 0)),
        "cudnn": KernelNeeds((8, 0), half=True),
        "flash_attn": KernelNeeds((8, 0), half=True, package="flash_attn"),
        "flash_attn_3": KernelNeeds((9, 0), half=True, package="flash_attn_interface"),
    }
)


@dataclass(frozen=True)
class Settings:
    """Settings of ``flash``."""

    kernel: str = field(default="auto", metadata={"help": f"one of {', '.join(KERNELS)}"})


@hookimpl
def xdit_settings() -> type[Settings]:
    """``flash.kernel``."""
    return Settings


@hookimpl
def xdit_declare(settings: Settings, facts: ModelFacts) -> Declaration:
    """Innermost in the attention."""
    unknown = Problem(f"flash.kernel={settings.kernel} is unknown", f"use one of {', '.join(KERNELS)}")
    return Declaration(
        claims=(Claim("kernel", "it computes the attention itself"),),
        wraps=(Wrap("attention", "kernel"),),
        problems=() if settings.kernel in KERNELS else (unknown,),
        fidelity=EXACT,
    )


@hookimpl
def xdit_check(settings: Settings, facts: ModelFacts, plan: Plan) -> Iterator[Problem]:
    """A kernel that the device, the precision or the installation lacks."""
    kernel, name, device = KERNELS[settings.kernel], f"flash.kernel={settings.kernel}", plan.device
    works = ", ".join(n for n, k in KERNELS.items() if k.capability is None)
    dtype = plan.dtype
    if kernel.capability is not None and device == "cpu":
        yield Problem(f"{name} needs a CUDA device and this plan runs on the CPU", f"use one of {works}")
        return
    here = cuda_capability()
    if kernel.capability is not None and here is not None and here < kernel.capability:
        need, has = (".".join(map(str, c)) for c in (kernel.capability, here))
        yield Problem(
            f"{name} needs a device of compute capability {need} or more and this one has {has}", f"use one of {works}"
        )
    if (kernel.half or (settings.kernel == "flash" and device == "cuda")) and dtype == "float32":
        yield Problem(
            f"{name} computes in half precision and this plan in float32", "set dtype=bfloat16, or use another kernel"
        )
    if kernel.package and find_spec(kernel.package) is None:
        yield Problem(
            f"{name} needs the package {kernel.package}, which is not installed", f"install it, or use one of {works}"
        )


@hookimpl
def xdit_build(settings: Settings, rank: Rank) -> Built:
    """The wrap."""
    from xdit_flash.strategy import kernel_named

    return Built(wraps={"attention/kernel": kernel_named(settings.kernel)})
