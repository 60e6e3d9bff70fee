"""A VAE whose work is divided among the ranks of one picture.

Shapes: latents ``[B, C, h, w]`` or ``[B, C, f, h, w]``; rows are the dim before the last.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from distvae.vae import decoder_adapter_name, encoder_adapter_name, parallelize_decoder, parallelize_encoder, tile_shape
from torch.utils._python_dispatch import TorchDispatchMode

from xdit_core import Built, Rank, UsageError
from xdit_parallel_vae.temporal import divide_temporal, is_temporal
from xdit_parallel_vae.tiles import deal_tiles

WITHOUT = "drop parallel_vae"


class ParallelVae:
    """The change of the VAE and the wrap around its ``decode``.

    Args:
        degree: ranks that decode a picture; None: all that make it.
        tiling: tiles instead of rows; None: only where rows cannot be divided.
        rank: this rank.
    """

    def __init__(self, degree: int | None, tiling: bool | None, rank: Rank) -> None:
        self.rank, self.tiling = rank, tiling
        axes = [a.name for a in rank.plan.axes if not a.own_outputs]
        ranks, self.index = 1, 0
        for axis in axes:
            ranks, self.index = ranks * rank.degree(axis), self.index * rank.degree(axis) + rank.index(axis)
        self.degree = degree or ranks
        self.everyone = self.degree == ranks
        self.group = rank.mesh.joint_group(axes) if self.everyone else rank.mesh.first_group(axes, self.degree)

    def built(self) -> Built:
        """The callables for the engine."""
        return Built(wraps={"decode/split": self.decode}, transforms={"quantize": self.prepare})

    def prepare(self, pipe: Any) -> None:
        """Divide the decoder, and the encoder where all ranks of a picture take part: one rank that encodes alone would
        be waited for.

        Raises:
            UsageError: there is no VAE, or none that can be divided in the way asked for.
        """
        vae = getattr(pipe, "vae", None)
        if vae is None:
            raise UsageError(f"{type(pipe).__name__} has no VAE that could be divided; {WITHOUT}.")
        if self.group is None:
            return
        kind = type(vae).__name__
        tiling = True if self.tiling is None and getattr(vae, "use_tiling", False) else self.tiling
        if not tiling and self.divide_rows(vae):
            if self.everyone and encoder_adapter_name(vae):
                parallelize_encoder(vae, self.group)
                vae.encode = self.watched(vae.encode)
            return
        if tiling is False:
            raise UsageError(f"the rows of a {kind} cannot be divided; leave out parallel_vae.tiling=no, or {WITHOUT}.")
        if not deal_tiles(vae, self.group):
            raise UsageError(f"parallel_vae can divide neither the rows nor the tiles of a {kind}; {WITHOUT}.")
        self.check_tiles(vae)

    def divide_rows(self, vae: Any) -> bool:
        """Divide the decoder along the rows of the picture, if there is a way."""
        if decoder_adapter_name(vae):
            parallelize_decoder(vae, self.group)
            return True
        if is_temporal(vae.decoder):
            divide_temporal(vae.decoder, self.group)
            return True
        return False

    def check_tiles(self, vae: Any) -> None:
        """There must be more than one tile.

        Raises:
            UsageError: there is not.
        """
        run, window = self.rank.plan.run, tile_shape(vae)
        if window is None or run.height is None or run.width is None or run.output_type == "latent":
            return
        if run.height <= window[0] and run.width <= window[1]:
            other = "leave out parallel_vae.tiling" if self.tiling else WITHOUT
            raise UsageError(
                f"one tile of {type(vae).__name__} covers {window[1]} x {window[0]} pixels, which leaves nothing to "
                f"divide in a picture of "
                f"{run.width} x {run.height}; draw a larger one, or {other}."
            )

    def decode(self, inner: Any, latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Decode on the ranks of the group.

        Sends per rank: two rows of activations at every convolution, and its part of the picture to the others.

        Args:
            latents: the same on all ranks of the picture.

        Returns:
            What ``inner`` returns; None on ranks that do not take part.

        Raises:
            UsageError: the latents have fewer rows than there are ranks, or tiles that do not fit together.
        """
        if self.index >= self.degree:
            return None
        if self.group is None:
            return inner(latents, *args, **kwargs)
        if latents.shape[-2] < self.degree:
            raise UsageError(
                f"latents of {latents.shape[-2]} rows cannot be decoded by {self.degree} ranks; draw a larger "
                f"picture, or lower "
                "parallel_vae.degree."
            )
        result = self.watched(inner)(latents, *args, **kwargs)
        picture = result[0]
        factors = {picture.shape[i] / latents.shape[i] for i in (-2, -1)}
        if len(factors) > 1:
            raise UsageError(
                f"the tiles of this VAE do not fit together: {latents.shape[-1]} x {latents.shape[-2]} latents became "
                f"{picture.shape[-1]} x {picture.shape[-2]} pixels; draw another size, or {WITHOUT}."
            )
        return result

    def watched(self, function: Any) -> Any:
        """The function with its traffic counted, its waits told and the refusals of DistVAE as sentences."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with refusals(self.degree), Watch(self.rank, self.group):
                return function(*args, **kwargs)

        return run


@contextmanager
def refusals(degree: int) -> Iterator[None]:
    """What DistVAE cannot cut, it says before any rank sends, and on all ranks alike."""
    try:
        yield
    except ValueError as error:
        if not str(error).startswith("Cannot split"):
            raise
        raise UsageError(
            f"the VAE cannot be divided among {degree} ranks ({error}); take a larger picture, or lower "
            f"parallel_vae.degree."
        ) from error


class Watch(TorchDispatchMode):
    """Sees the collectives of others' code: counts what they send, and says when this rank waits.

    Args:
        rank: counted under ``vae``.
        group: over which they go.
    """

    def __init__(self, rank: Rank, group: dist.ProcessGroup | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rank, self.group, self.others = rank, group, dist.get_world_size(group) - 1
        self._wait = ExitStack()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._wait.close()
        if func.namespace == "c10d":
            self.rank.sent["vae"] += self.bytes_of(func, args)
            group = (
                None if func.overloadpacket.__name__ in ("send", "recv_") else self.group
            )  # messages are no collectives
            wait = self.rank.waiting("the other ranks to decode", "vae", group)
            self._wait.enter_context(wait)  # until the next operation
        return func(*args, **(kwargs or {}))

    def __exit__(self, *details: Any) -> None:
        self._wait.close()
        super().__exit__(*details)  # type: ignore[no-untyped-call]

    def bytes_of(self, func: Any, args: Any) -> int:
        """What this rank sends: its part to all others in a gather, about two parts in all in a reduction."""
        name, sent = func.overloadpacket.__name__, 0
        if name == "allgather_":
            sent = sum(x.nbytes for x in args[1]) * self.others
        elif name == "allreduce_":
            sent = 2 * sum(x.nbytes for x in args[0]) * self.others // (self.others + 1)
        elif name == "send":
            sent = sum(x.nbytes for x in args[0])
        return sent
