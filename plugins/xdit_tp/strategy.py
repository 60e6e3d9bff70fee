"""Divides the weight matrices of the blocks among ranks with ``torch.distributed.tensor.parallel``.

This is done while the parameters have shapes and no values yet, so each rank reads and holds only its own part.
"""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatch
from typing import Any

import torch
from torch import nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor, all_reduce
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from xdit_core import Absent, ModelError, Rank


def styles() -> dict[str, Callable[[], ParallelStyle]]:
    """The words of a plan: ``colwise`` leaves the columns where they are, ``gathered`` brings them together,
    ``rowwise`` sums.

    ``normed`` is for an RMS norm over columns that are divided.
    """
    return {
        "normed": NormAcross,
        "colwise": ColwiseParallel,
        "gathered": lambda: ColwiseParallel(output_layouts=Replicate()),
        "rowwise": RowwiseParallel,
    }


class NormAcross(ParallelStyle):
    """An RMS norm over all columns where a rank has its part of them: the squares are summed over the ranks.

    Sends per rank: ``2 x (N-1)/N x B x S`` elements in float32.
    """

    def _apply(self, module: nn.Module, device_mesh: Any) -> nn.Module:
        weight: Any = module.weight
        columns, group, eps = weight.shape[0], device_mesh.get_group(), module.eps or torch.finfo(weight.dtype).eps
        module.weight = nn.Parameter(distribute_tensor(weight, device_mesh, [Shard(0)]), requires_grad=False)

        def forward(x: torch.Tensor) -> torch.Tensor:
            squares = x.float().pow(2).sum(-1, keepdim=True)
            if squares.numel():
                squares = all_reduce(squares, "sum", group)
            part: Any = module.weight
            normed: torch.Tensor = (x * torch.rsqrt(squares / columns + eps)).to(x.dtype) * part.to_local().to(x.dtype)
            return normed

        module.forward = forward
        return module


class Divide:
    """Divides the matrices that the adapter names.

    Sends per rank and ``rowwise`` matrix: ``2 x (N-1)/N x B x S x width`` elements, two matrices a stream and block.
    """

    def __init__(self, rank: Rank) -> None:
        self.rank, self.mesh, self.degree = rank, rank.mesh.submesh("tp"), rank.degree("tp")

    def __call__(self, denoiser: nn.Module) -> None:
        """Change the modules in place.

        Raises:
            ModelError: a key of the plan matches no module, or a matrix does not divide.
        """
        if self.mesh is None:
            return
        self.forget()
        plan = self.rank.spec.trunk.tp_plan or dict(getattr(type(denoiser), "_tp_plan", None) or {})
        names = {name for name, _ in denoiser.named_modules()}
        for name, module in denoiser.named_modules():
            if isinstance(module, Absent):
                names |= {f"{name}.{inside}" for inside in module.names}
        unmatched = sorted(pattern for pattern in plan if not any(fnmatch(name, pattern) for name in names))
        if unmatched:
            raise ModelError(
                f"the matrices of {self.rank.spec.name} name {', '.join(unmatched)}, which {type(denoiser).__name__} "
                "does not have; a part of the model would stay undivided, so correct the adapter."
            )
        known, fewer = styles(), set()
        for name, module in list(denoiser.named_modules()):
            style = next((style for pattern, style in plan.items() if fnmatch(name, pattern)), None)
            if style is None:
                continue
            self.check(name, module, style)
            parallelize_module(module, self.mesh, known[style]())
            packed = getattr(
                module, "_tp_packed_row_blocks", None
            )  # diffusers' word for inputs that were put one behind the other
            if packed and style == "rowwise":
                module.weight.packed = (1, tuple(packed))
            self.count(module, style)
            if style != "normed":
                self.pass_nothing(module, style)
            if style == "colwise":
                fewer.add(name.rpartition(".")[0])
        for name in fewer:
            parent = denoiser.get_submodule(name)
            for attribute in ("heads", "inner_dim") if hasattr(parent, "heads") else ():  # a processor may divide them
                if isinstance(getattr(parent, attribute, None), int):
                    setattr(parent, attribute, getattr(parent, attribute) // self.degree)

    @staticmethod
    def forget() -> None:
        """Torch keeps how operations on a mesh divide, and takes an old mesh for a new one over the same ranks, whose
        groups have gone."""
        from torch.distributed.tensor.debug import _clear_sharding_prop_cache

        _clear_sharding_prop_cache()  # type: ignore[no-untyped-call]

    def check(self, name: str, module: nn.Module, style: str) -> None:
        """A matrix that can be divided evenly."""
        size = getattr(module, "in_features" if style == "rowwise" else "out_features", None)
        if style == "normed" and getattr(module, "weight", None) is not None:
            weight: Any = module.weight
            size = weight.shape[0]
        if style not in styles() or size is None or size % self.degree:
            raise ModelError(
                f"{name} of {self.rank.spec.name} cannot be divided {style} by tp.degree={self.degree} "
                f"({'it is no Linear' if size is None else f'{size} features'}); use another degree or correct the "
                "adapter."
            )

    def pass_nothing(self, module: nn.Module, style: str) -> None:
        """A stream may have no rows (text that belongs to another patch), with which DTensor cannot multiply."""
        weight: Any = module.weight
        original: Callable[[torch.Tensor], torch.Tensor] = module.forward
        mesh, features = self.mesh, weight.shape[0]

        def forward(x: DTensor) -> torch.Tensor:
            if x.numel():
                return original(x)
            width, place = (features, Replicate()) if style == "rowwise" else (features // self.degree, Shard(-1))
            nothing = x.to_local().new_empty(*x.shape[:-1], width)
            return DTensor.from_local(nothing, mesh, [place], run_check=False)

        module.forward = forward

    def count(self, module: nn.Module, style: str) -> None:
        """Count what the module's collective sends."""
        if style in ("colwise", "normed"):
            return
        times, name = (2, "tp") if style == "rowwise" else (1, "tp.modulation")

        def add(_: nn.Module, inputs: Any, out: torch.Tensor) -> None:
            if not torch.compiler.is_compiling():
                self.rank.sent[name] += times * out.nbytes * (self.degree - 1) // self.degree

        module.register_forward_hook(add)
        if self.rank.observer.sees_every_wait:
            module.register_forward_hook(self.seen)

    def seen(self, _: nn.Module, inputs: Any, out: torch.Tensor) -> torch.Tensor:
        """The module's collective, waited for at once, so that a trace shows it."""
        if torch.compiler.is_compiling() or not isinstance(out, AsyncCollectiveTensor):
            return out
        with self.rank.waiting("the parts of the other ranks", "tp", self.rank.group("tp")):
            whole: torch.Tensor = out.wait()
        return whole
