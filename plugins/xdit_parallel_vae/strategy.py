"""Divides the decoding of one picture among the ranks that computed its latents, by rows or by tiles.

Shapes: latents ``[B, C, h, w]`` or ``[B, C, f, h, w]``; rows are the dim before the last.
"""

from __future__ import annotations

from typing import Any

import torch
from distvae.vae import decoder_adapter_name, encoder_adapter_name, parallelize_decoder, parallelize_encoder, tile_shape

from xdit_core import CollectiveWatch, Rank, UsageError
from xdit_parallel_vae.temporal import divide_temporal
from xdit_parallel_vae.tiles import deal_tiles

WITHOUT = "drop parallel_vae"


class ParallelVae:
    """The change of the VAE and the wrap around its ``decode``.

    Args:
        degree: ranks that decode a picture; None: all that make it.
        tiling: tiles instead of rows.
        rank: this rank.
    """

    def __init__(self, degree: int | None, tiling: bool, rank: Rank) -> None:
        self.rank, self.tiling = rank, tiling
        axes, ranks, self.index = rank.plan.picture_axes, rank.plan.ranks_of_a_picture, 0
        for axis in axes:
            self.index = self.index * rank.degree(axis) + rank.index(axis)
        self.degree = degree or ranks
        self.everyone = self.degree == ranks
        self.group = rank.mesh.joint_group(axes) if self.everyone else rank.mesh.first_group(axes, self.degree)

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
        if self.tiling or getattr(vae, "use_tiling", False):  # who turned it on has tiles without this plugin, too
            if not deal_tiles(vae, self.group):
                raise UsageError(f"the tiles of a {kind} cannot be dealt out to ranks; {WITHOUT}.")
            self.check_tiles(vae)
        elif not self.divide_rows(vae):
            raise UsageError(
                f"the rows of a {kind} cannot be divided among ranks; write parallel_vae.tiling=yes for overlapping "
                f"tiles, whose result differs a little from that of one rank, or {WITHOUT}."
            )
        elif self.everyone and encoder_adapter_name(vae):
            parallelize_encoder(vae, self.group)
            vae.encode = self.watched(vae.encode)

    def divide_rows(self, vae: Any) -> bool:
        """Divide the decoder along the rows of the picture, if there is a way."""
        if not decoder_adapter_name(vae):
            return divide_temporal(vae.decoder, self.group)
        parallelize_decoder(vae, self.group)
        return True

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
                f"divide in a picture of {run.width} x {run.height}; draw a larger one, or {other}."
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
                "picture, or lower parallel_vae.degree."
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
            try:
                with CollectiveWatch(self.rank, self.group, "vae", "the other ranks to decode"):
                    return function(*args, **kwargs)
            except ValueError as error:  # before any rank sends, and on all ranks alike
                if not str(error).startswith("Cannot split"):
                    raise
                raise UsageError(
                    f"the VAE cannot be divided among {self.degree} ranks ({error}); take a larger picture, or lower "
                    "parallel_vae.degree."
                ) from error

        return run
