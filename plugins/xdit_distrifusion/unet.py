"""The layers of a U-Net that look beyond their patch (arXiv:2402.19481, section 4): convolutions, norms over groups,
self-attention.

Each sees its own patch fresh and the others as they were a step before. Shapes: activations ``[B, C, h, w]``, tokens
``[B, n, D]``.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from xdit_core import ForwardContext, ModelError
from xdit_distrifusion.exchange import Exchange


def neighbours(denoiser: nn.Module, exchange: Exchange) -> None:
    """Let the layers of a U-Net share what they must; their weights are not touched.

    Raises:
        ModelError: a layer of a kind that cannot be cut into patches.
    """
    for name, module in denoiser.named_modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size[0] > 1:
            kernel, padding = module.kernel_size[0], module.padding
            if padding == "same" or isinstance(padding, str) or 2 * padding[0] != kernel - 1 or module.dilation[0] > 1:
                raise ModelError(
                    f"{name} is a convolution that distrifusion cannot cut into patches; drop distrifusion."
                )
            replace_forward(module, Halo(name, module, exchange))
        elif isinstance(module, nn.GroupNorm):
            replace_forward(module, GroupNorm(name, module, exchange))
        elif getattr(module, "is_cross_attention", None) is False:
            for part in ("to_k", "to_v"):
                linear = module.get_submodule(part)
                replace_forward(linear, AllRows(f"{name}.{part}", linear.forward, exchange))


def replace_forward(module: nn.Module, forward: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Let a module do something else; its weights stay."""
    module.__dict__["forward"] = forward


class Halo:
    """A convolution with the rows above and below that belong to the patches there; zeros where there is no picture.

    Sends per rank: the first and last rows of its patch, ``2 x B x C x padding x w`` elements to each of the others.
    """

    def __init__(self, name: str, conv: nn.Conv2d, exchange: Exchange) -> None:
        self.name, self.conv, self.exchange = name, conv, exchange
        self.original, self.rows = conv.forward, int(conv.padding[0])

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, C, h, w]`` to what the convolution makes of it."""
        context = self.exchange.rank.context
        if context.layout.patches == 1:
            return self.original(x)
        if context.patch is None:
            patches = torch.split(x, rows_of(context, x.shape[-2]), dim=-2)
            self.exchange.whole(context, self.name, lambda: {m: self.edges(part) for m, part in enumerate(patches)})
            return self.original(x)
        parts = self.exchange.parts(context, self.name, self.edges(x), [2] * context.layout.patches, 0)
        above, below = parts.get(context.patch - 1), parts.get(context.patch + 1)
        nothing = x.new_zeros(*x.shape[:-2], self.rows, x.shape[-1])
        wide = torch.cat((nothing if above is None else above[1], x, nothing if below is None else below[0]), dim=-2)
        conv = self.conv
        return F.conv2d(
            wide, conv.weight, conv.bias, conv.stride, (0, int(conv.padding[1])), conv.dilation, conv.groups
        )

    def edges(self, x: torch.Tensor) -> torch.Tensor:
        """First and last rows, ``[2, B, C, rows, w]``."""
        return torch.stack((x[..., : self.rows, :], x[..., -self.rows :, :]))


class GroupNorm:
    """A norm with the mean and variance of the whole picture.

    Sends per rank: ``2 x B x groups`` elements to each of the others.
    """

    def __init__(self, name: str, norm: nn.GroupNorm, exchange: Exchange) -> None:
        self.name, self.norm, self.exchange, self.original = name, norm, exchange, norm.forward

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, C, h, w]`` to the same shape."""
        context, norm = self.exchange.rank.context, self.norm
        if context.layout.patches == 1:
            return self.original(x)
        rows = rows_of(context, x.shape[-2])
        if context.patch is None:
            patches = torch.split(x, rows, dim=-2)
            self.exchange.whole(context, self.name, lambda: {m: self.moments(part) for m, part in enumerate(patches)})
            return self.original(x)
        parts = self.exchange.parts(context, self.name, self.moments(x), [2] * context.layout.patches, 0)
        share = torch.tensor(rows, dtype=torch.float32, device=x.device)[list(parts)]
        share = (share / share.sum()).view(-1, 1, 1)
        means, variances = torch.stack(list(parts.values()), dim=1)
        mean = (share * means).sum(0)
        variance = (share * (variances + (means - mean) ** 2)).sum(0)
        grouped = torch.unflatten(x, 1, (norm.num_groups, -1)).float()
        shape = (*mean.shape, *[1] * (grouped.dim() - 2))
        out = ((grouped - mean.view(shape)) * torch.rsqrt(variance.view(shape) + norm.eps)).flatten(1, 2)
        if norm.affine:
            across = (1, -1, *[1] * (x.dim() - 2))
            out = out * norm.weight.float().view(across) + norm.bias.float().view(across)
        result: torch.Tensor = out.to(x.dtype)
        return result

    def moments(self, x: torch.Tensor) -> torch.Tensor:
        """Mean and variance of each group, ``[2, B, groups]`` in float32."""
        variance, mean = torch.var_mean(
            torch.unflatten(x, 1, (self.norm.num_groups, -1)).flatten(2).float(), dim=2, correction=0
        )
        return torch.stack((mean, variance))


class AllRows:
    """Keys or values of all patches where those of one were asked for.

    Sends per rank: ``B x n/N x D`` elements to each of the others.
    """

    def __init__(self, name: str, original: Callable[[torch.Tensor], torch.Tensor], exchange: Exchange) -> None:
        self.name, self.original, self.exchange = name, original, exchange

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, n of the patch, D]`` to ``[B, n of all, D]``."""
        context, out = self.exchange.rank.context, self.original(x)
        if context.layout.patches == 1:
            return out
        here = (
            context.layout.rows
            if context.patch is None
            else context.cuts[context.patch + 1] - context.cuts[context.patch]
        )
        factor = 1
        while halved(here, factor) * halved(context.layout.columns, factor) > out.shape[1]:
            factor *= 2
        width = halved(context.layout.columns, factor)
        sizes = [n * width for n in rows_of(context, halved(here, factor))]
        if context.patch is None:
            self.exchange.whole(context, self.name, lambda: dict(enumerate(torch.split(out, sizes, dim=1))))
            return out
        return torch.cat(list(self.exchange.parts(context, self.name, out, sizes, 1).values()), dim=1)


def halved(side: int, factor: int) -> int:
    """A side at a level of the U-Net where it is ``factor`` times smaller."""
    return -(-side // factor)


def rows_of(context: ForwardContext, rows: int) -> list[int]:
    """Rows of each patch at the level where the patch in hand, or the whole picture, has ``rows`` rows."""
    lengths = [b - a for a, b in pairwise(context.cuts)]
    here, factor = context.layout.rows if context.patch is None else lengths[context.patch], 1
    while halved(here, factor) > rows:
        factor *= 2
    return [halved(n, factor) for n in lengths]
