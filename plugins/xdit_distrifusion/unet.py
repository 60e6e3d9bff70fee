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
            module.forward = Halo(name, module, exchange)
        elif isinstance(module, nn.GroupNorm):
            module.forward = GroupNorm(name, module, exchange)
        elif getattr(module, "is_cross_attention", None) is False:
            for part in ("to_k", "to_v"):
                linear = module.get_submodule(part)
                linear.forward = AllRows(f"{name}.{part}", linear.forward, exchange)


class Halo:
    """A convolution with the rows above and below that belong to the patches there; zeros where there is no picture.

    Sends per rank: the first and last rows of its patch, ``2 x B x C x padding x w`` elements to each of the others.
    """

    def __init__(self, name: str, conv: nn.Conv2d, exchange: Exchange) -> None:
        self.name, self.conv, self.exchange = name, conv, exchange
        self.original, self.rows = conv.forward, int(conv.padding[0])

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, C, h, w]`` to what the convolution makes of it."""
        now = self.exchange.now
        if now.layout.patches == 1:
            return self.original(x)
        if now.patch is None:
            patches = x.split(rows_of(now, x.shape[-2]), dim=-2)
            self.exchange.whole(self.name, lambda: {m: self.edges(part) for m, part in enumerate(patches)})
            return self.original(x)
        parts = self.exchange.parts(self.name, self.edges(x), [2] * now.layout.patches, 0)
        above, below = parts.get(now.patch - 1), parts.get(now.patch + 1)
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
        now, norm = self.exchange.now, self.norm
        if now.layout.patches == 1:
            return self.original(x)
        rows = rows_of(now, x.shape[-2])
        if now.patch is None:
            patches = x.split(rows, dim=-2)
            self.exchange.whole(self.name, lambda: {m: self.moments(part) for m, part in enumerate(patches)})
            return self.original(x)
        parts = self.exchange.parts(self.name, self.moments(x), [2] * now.layout.patches, 0)
        share = torch.tensor(rows, dtype=torch.float32, device=x.device)[list(parts)]
        share = (share / share.sum()).view(-1, 1, 1)
        means, variances = torch.stack(list(parts.values()), dim=1)
        mean = (share * means).sum(0)
        variance = (share * (variances + (means - mean) ** 2)).sum(0)
        grouped = x.unflatten(1, (norm.num_groups, -1)).float()
        shape = (*mean.shape, *[1] * (grouped.dim() - 2))
        out = ((grouped - mean.view(shape)) * torch.rsqrt(variance.view(shape) + norm.eps)).flatten(1, 2)
        if norm.affine:
            across = (1, -1, *[1] * (x.dim() - 2))
            out = out * norm.weight.float().view(across) + norm.bias.float().view(across)
        return out.to(x.dtype)

    def moments(self, x: torch.Tensor) -> torch.Tensor:
        """Mean and variance of each group, ``[2, B, groups]`` in float32."""
        variance, mean = torch.var_mean(
            x.unflatten(1, (self.norm.num_groups, -1)).flatten(2).float(), dim=2, correction=0
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
        now, out = self.exchange.now, self.original(x)
        if now.layout.patches == 1:
            return out
        here = now.layout.rows if now.patch is None else now.cuts[now.patch + 1] - now.cuts[now.patch]
        factor = 1
        while halved(here, factor) * halved(now.layout.columns, factor) > out.shape[1]:
            factor *= 2
        width = halved(now.layout.columns, factor)
        sizes = [n * width for n in rows_of(now, halved(here, factor))]
        if now.patch is None:
            self.exchange.whole(self.name, lambda: dict(enumerate(out.split(sizes, dim=1))))
            return out
        return torch.cat(list(self.exchange.parts(self.name, out, sizes, 1).values()), dim=1)


def halved(side: int, factor: int) -> int:
    """A side at a level of the U-Net where it is ``factor`` times smaller."""
    return -(-side // factor)


def rows_of(now: ForwardContext, rows: int) -> list[int]:
    """Rows of each patch at the level where the patch in hand, or the whole picture, has ``rows`` rows."""
    lengths = [b - a for a, b in pairwise(now.cuts)]
    here, factor = now.layout.rows if now.patch is None else lengths[now.patch], 1
    while halved(here, factor) > rows:
        factor *= 2
    return [halved(n, factor) for n in lengths]
