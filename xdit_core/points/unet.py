"""A U-Net in patches: the layers that look beyond their patch, as in DistriFusion (Li et al. 2024, arXiv:2402.19481,
section 4): convolutions, norms over groups, self-attention.

Each computes with its own patch and with what an exchange has of the other patches. Shapes: activations
``[B, C, h, w]``, tokens ``[B, n, D]``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from xdit_core.errors import ModelError
from xdit_core.parallel.rank import Rank
from xdit_core.points.context import ForwardContext

Layer = Callable[[torch.Tensor], torch.Tensor]
Parts = dict[int, torch.Tensor]  # by patch


class PatchExchange(Protocol):
    """The exchange between patches that a strategy brings for the layers of a U-Net."""

    rank: Rank

    def keep_whole(self, context: ForwardContext, key: Any, cut: Callable[[], Parts]) -> None:
        """Note that the whole picture was computed; ``cut`` returns the parts of each patch, if they are needed."""

    def parts(self, context: ForwardContext, key: Any, mine: torch.Tensor, sizes: Sequence[int], dim: int) -> Parts:
        """Share the computed part of a patch; return the parts of all patches, ``sizes`` long along ``dim``."""


def share_between_patches(denoiser: nn.Module, exchange: PatchExchange) -> None:
    """Change a U-Net so that it can compute one patch of the picture; used in the phase ``adapt``.

    Its layers then exchange with the other patches what they need of them. Their weights are not changed.

    Raises:
        ModelError: a layer of a kind that cannot be cut into patches.
    """
    for name, module in denoiser.named_modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size[0] > 1:
            kernel, padding = module.kernel_size[0], module.padding
            if isinstance(padding, str) or 2 * padding[0] != kernel - 1 or module.dilation[0] > 1:
                raise ModelError(
                    f"{name} is a convolution that cannot be cut into patches; run this model without "
                    "strategies that cut the picture into patches."
                )
            module.__dict__["forward"] = Convolution(name, module, exchange)
        elif isinstance(module, nn.GroupNorm):
            module.__dict__["forward"] = GroupNorm(name, module, exchange)
        elif getattr(module, "is_cross_attention", None) is False:
            for part in ("to_k", "to_v"):
                linear = module.get_submodule(part)
                linear.__dict__["forward"] = KeysOrValues(f"{name}.{part}", linear.forward, exchange)


class SharingLayer(ABC):
    """A layer that looks beyond its patch.

    Args:
        name: of the layer, unique in the denoiser.
        original: its own forward.
        exchange: between the patches.
    """

    def __init__(self, name: str, original: Layer, exchange: PatchExchange) -> None:
        self.name, self.original, self.exchange = name, original, exchange

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's result for a patch, or for the whole picture."""
        context = self.exchange.rank.context
        if context.layout.patches == 1:
            return self.original(x)
        if context.patch is None:
            self.exchange.keep_whole(context, self.name, lambda: self.cut(x, context))
            return self.original(x)
        return self.compute(x, context)

    @abstractmethod
    def cut(self, x: torch.Tensor, context: ForwardContext) -> Parts:
        """Return what each patch of a whole picture shares with the others."""

    @abstractmethod
    def compute(self, x: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """The layer's result for a patch."""


class ActivationLayer(SharingLayer):
    """A layer on activations ``[B, C, h, w]``, of which a patch shares two things, stacked in the first dim."""

    @abstractmethod
    def share(self, x: torch.Tensor) -> torch.Tensor:
        """Return what a patch shares with the others."""

    def cut(self, x: torch.Tensor, context: ForwardContext) -> Parts:
        """What each patch of a whole picture shares."""
        parts = torch.split(x, rows_of_patches(context, x.shape[-2]), dim=-2)
        return {patch: self.share(part) for patch, part in enumerate(parts)}

    def parts(self, x: torch.Tensor, context: ForwardContext) -> Parts:
        """What all patches share."""
        return self.exchange.parts(context, self.name, self.share(x), [2] * context.layout.patches, 0)


class Convolution(ActivationLayer):
    """A convolution with the rows above and below that belong to other patches; zeros beyond the picture.

    Sends per rank: the first and last rows of its patch, ``2 x B x C x padding x w`` elements to each of the others.
    """

    def __init__(self, name: str, conv: nn.Conv2d, exchange: PatchExchange) -> None:
        super().__init__(name, conv.forward, exchange)
        self.conv, self.rows = conv, int(conv.padding[0])

    def share(self, x: torch.Tensor) -> torch.Tensor:
        """First and last rows, ``[2, B, C, rows, w]``."""
        return torch.stack((x[..., : self.rows, :], x[..., -self.rows :, :]))

    def compute(self, x: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """``[B, C, h, w]`` to what the convolution makes of it."""
        parts, patch, conv = self.parts(x, context), context.patch or 0, self.conv
        above, below = parts.get(patch - 1), parts.get(patch + 1)
        zeros = x.new_zeros(*x.shape[:-2], self.rows, x.shape[-1])
        wide = torch.cat((zeros if above is None else above[1], x, zeros if below is None else below[0]), dim=-2)
        padding = (0, int(conv.padding[1]))
        return F.conv2d(wide, conv.weight, conv.bias, conv.stride, padding, conv.dilation, conv.groups)


class GroupNorm(ActivationLayer):
    """A norm with the mean and variance of the whole picture.

    Sends per rank: ``2 x B x groups`` elements to each of the others.
    """

    def __init__(self, name: str, norm: nn.GroupNorm, exchange: PatchExchange) -> None:
        super().__init__(name, norm.forward, exchange)
        self.norm = norm

    def share(self, x: torch.Tensor) -> torch.Tensor:
        """Mean and variance of each group, ``[2, B, groups]`` in float32."""
        groups = torch.unflatten(x, 1, (self.norm.num_groups, -1)).flatten(2).float()
        variance, mean = torch.var_mean(groups, dim=2, correction=0)
        return torch.stack((mean, variance))

    def compute(self, x: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """``[B, C, h, w]`` to the same shape."""
        parts, norm = self.parts(x, context), self.norm
        rows = rows_of_patches(context, x.shape[-2])
        share = torch.tensor(rows, dtype=torch.float32, device=x.device)[list(parts)]
        share = (share / share.sum()).view(-1, 1, 1)
        means, variances = torch.stack(list(parts.values()), dim=1)
        mean = (share * means).sum(0)
        variance = (share * (variances + (means - mean) ** 2)).sum(0)
        grouped = torch.unflatten(x, 1, (norm.num_groups, -1)).float()
        shape = (*mean.shape, *[1] * (grouped.dim() - 2))
        out = ((grouped - mean.view(shape)) * torch.rsqrt(variance.view(shape) + norm.eps)).flatten(1, 2)
        if norm.affine:
            channels = (1, -1, *[1] * (x.dim() - 2))
            out = out * norm.weight.float().view(channels) + norm.bias.float().view(channels)
        result: torch.Tensor = out.to(x.dtype)
        return result


class KeysOrValues(SharingLayer):
    """Keys or values of all patches where those of one were asked for, tokens ``[B, n, D]``.

    Sends per rank: ``B x n/N x D`` elements to each of the others.
    """

    def cut(self, x: torch.Tensor, context: ForwardContext) -> Parts:
        """The keys or values of each patch of a whole picture."""
        out = self.original(x)
        return dict(enumerate(torch.split(out, self.sizes(out, context), dim=1)))

    def compute(self, x: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """``[B, n of the patch, D]`` to ``[B, n of all, D]``."""
        out = self.original(x)
        parts = self.exchange.parts(context, self.name, out, self.sizes(out, context), 1)
        return torch.cat(list(parts.values()), dim=1)

    def sizes(self, out: torch.Tensor, context: ForwardContext) -> list[int]:
        """Tokens of each patch at the level of the U-Net where these are."""
        (top, bottom), columns, factor = context.latent_rows, context.layout.columns, 1
        while halved(bottom - top, factor) * halved(columns, factor) > out.shape[1]:
            factor *= 2
        return [n * halved(columns, factor) for n in rows_of_patches(context, halved(bottom - top, factor))]


def halved(side: int, factor: int) -> int:
    """A side at a level of the U-Net where it is ``factor`` times smaller."""
    return -(-side // factor)


def rows_of_patches(context: ForwardContext, rows: int) -> list[int]:
    """Rows of each patch at the level where the patch that is computed, or the whole picture, has ``rows`` rows."""
    (top, bottom), factor = context.latent_rows, 1
    while halved(bottom - top, factor) > rows:
        factor *= 2
    return [halved(stop - start, factor) for start, stop in pairwise(context.cuts)]
