"""The decoder of ``AutoencoderKLTemporalDecoder`` (Latte, Stable Video Diffusion) by rows; DistVAE has its pieces and
no adapter.

Behind the middle block, which attends over whole frames, every layer looks at neighbouring rows at most: 2D
convolutions, group norms, and convolutions over time that look at one row only.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import TemporalDecoder
from distvae.modules.adapters.layers.conv_adapters import Conv2dAdapter
from distvae.modules.adapters.layers.norm_adapters import GroupNormAdapter
from distvae.modules.patch_utils import DePatchify, Patchify
from distvae.utils import ParallelContext, parallel_context
from torch import nn


def divide_temporal(decoder: Any, group: dist.ProcessGroup | None) -> bool:
    """Divide the part of the decoder behind its middle block, in place; False if it is a decoder of another class.

    Args:
        decoder: frames ``[B x f, C, h, w]`` in and out; the result is whole on every rank.
    """
    if not isinstance(decoder, TemporalDecoder):
        return False
    context = parallel_context(group, -2, ndim=4)
    cut, join = Patchify(parallel_context=context), DePatchify(parallel_context=context)
    for part in (decoder.up_blocks, decoder.conv_norm_out, decoder.conv_out):
        adapt(decoder, part, context)
    decoder.up_blocks[0].register_forward_pre_hook(lambda module, args: (cut(args[0]), *args[1:]))
    decoder.register_forward_hook(lambda module, args, out: join(out))
    return True


def adapt(parent: nn.Module, module: nn.Module, context: ParallelContext) -> None:
    """Replace the layers of a module that look at other rows, the module itself in its parent included."""
    for child in list(module.children()):
        adapt(module, child, context)
    made: nn.Module | None = None
    if isinstance(module, nn.Conv2d) and module.kernel_size[0] > 1:
        made = Conv2dAdapter(module, parallel_context=context)
    elif isinstance(module, nn.GroupNorm):
        made = GroupNormAdapter(module, parallel_context=context)
    if made is not None:
        setattr(parent, next(name for name, child in parent.named_children() if child is module), made)
