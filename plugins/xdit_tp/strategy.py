"""Divides the weight matrices of the blocks among ranks.

This is done while the parameters have shapes and no values yet, so each rank reads and holds only its own part.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch
from types import MappingProxyType
from typing import Any

from torch import nn

from xdit_core import Absent, ModelError, Rank, keep_slice
from xdit_tp.layers import GatheredLinear, Parts, RMSNormAcross, RowwiseLinear

# The words of a plan, each with the dim of the weight that is divided. ``colwise`` leaves the columns of the result
# where they are, ``gathered`` brings them together, ``rowwise`` sums; ``normed`` is an RMS norm over columns that are
# divided.
STYLES = MappingProxyType({"colwise": 0, "gathered": 0, "rowwise": 1, "normed": 0})


def style_of(word: Any) -> tuple[str, Sequence[int] | None]:
    """What a plan says of a matrix: one of the words, and the sizes of its parts in proportion to each other if it
    consists of several; diffusers has classes for these."""
    from diffusers.hooks.tensor_parallel import PackedColwiseParallel, PackedRowwiseParallel

    if isinstance(word, (PackedColwiseParallel, PackedRowwiseParallel)):
        return "colwise" if isinstance(word, PackedColwiseParallel) else "rowwise", word.blocks
    return word, None


def packed(module: nn.Module, parent: nn.Module, style: str) -> Sequence[int]:
    """Sizes of the matrices that a matrix consists of, in proportion to each other; each of them is divided."""
    from diffusers.models.activations import GEGLU, SwiGLU

    if style == "colwise" and isinstance(parent, (GEGLU, SwiGLU)):
        return 1, 1  # values and gates
    sizes = {"rowwise": "_tp_packed_row_blocks", "colwise": "_tp_packed_col_blocks"}.get(style, "")
    return tuple(getattr(module, sizes, None) or (1,))


class Divide:
    """Divides the matrices that the adapter names.

    Sends per rank and ``rowwise`` matrix: ``2 x (N-1)/N x B x S x width`` elements, two matrices a stream and block.
    """

    def __init__(self, rank: Rank) -> None:
        group = rank.group("tp")
        self.rank, self.parts = rank, None if group is None else Parts(rank, group)

    def __call__(self, denoiser: nn.Module) -> None:
        """Change the modules in place.

        Raises:
            ModelError: a key of the plan matches no module, or a matrix does not divide.
        """
        if self.parts is None:
            return
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
        fewer = set()
        for name, module in list(denoiser.named_modules()):
            word = next((word for pattern, word in plan.items() if fnmatch(name, pattern)), None)
            if word is None:
                continue
            style, sizes = style_of(word)
            parent = denoiser.get_submodule(name.rpartition(".")[0])
            denoiser.set_submodule(name, self.divided(name, module, style, sizes or packed(module, parent, style)))
            if style == "colwise":
                fewer.add(parent)
        for parent in fewer:
            for attribute in ("heads", "inner_dim") if hasattr(parent, "heads") else ():  # a processor may divide them
                if isinstance(getattr(parent, attribute, None), int):
                    setattr(parent, attribute, getattr(parent, attribute) // self.parts.degree)

    def divided(self, name: str, module: nn.Module, style: str, sizes: Sequence[int]) -> nn.Module:
        """What stands for a layer on this rank.

        Args:
            name: of the layer.
            sizes: of the matrices that it consists of, in proportion to each other.

        Raises:
            ModelError: it does not divide.
        """
        assert self.parts is not None
        dim, degree, index = STYLES.get(style), self.parts.degree, self.parts.index
        weight: Any = getattr(module, "weight", None)
        takes = style == "normed" if not isinstance(module, nn.Linear) else style != "normed"
        size = weight.shape[dim] if weight is not None and takes and dim is not None else None
        if size is None or any(size * one % (sum(sizes) * degree) for one in sizes):
            raise ModelError(
                f"{name} of {self.rank.spec.name} cannot be divided {style} by tp.degree={degree} "
                f"({'it is no Linear' if size is None else f'{size} features'}); use another degree or correct the "
                "adapter."
            )
        ranges, start = [], 0
        for one in sizes:
            whole = size * one // sum(sizes)
            ranges.append((start + whole * index // degree, start + whole * (index + 1) // degree))
            start += whole
        keep_slice(module, "weight", dim or 0, ranges)
        if dim == 0 and getattr(module, "bias", None) is not None:
            keep_slice(module, "bias", 0, ranges)
        if isinstance(module, nn.Linear):
            if style == "rowwise":
                return RowwiseLinear(module, self.parts)
            if style == "gathered":
                return GatheredLinear(module, self.parts)
            module.out_features = module.weight.shape[0]
            return module
        return RMSNormAcross(module, self.parts, size)
