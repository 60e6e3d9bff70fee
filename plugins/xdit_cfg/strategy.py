"""Computes the conditional and the unconditional prediction of guidance on two ranks, which then exchange them.

Shapes: latents and prediction ``[B, C, h, w]``; with batched guidance ``B`` is twice the number of pictures, the
unconditional half first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from xdit_core import (
    Channel,
    ForwardCall,
    ForwardContext,
    LocalPlacement,
    Message,
    PatchTensor,
    Rank,
    Receive,
    RunForward,
    UnsupportedCall,
)


class Guidance:
    """The wrap of ``cfg``. It halves a batch that holds both predictions; of separate calls a rank makes every second.

    Sends per rank and step: its prediction, ``B/2 x C x h x w`` elements, once.
    """

    def __init__(self, rank: Rank) -> None:
        self.rank, self.spec = rank, rank.spec
        self.index = rank.index("cfg")
        self.peer = rank.mesh.ranks("cfg")[1 - self.index]
        self.channel = Channel(rank, rank.group("cfg"), "cfg")

    @contextmanager
    def job(self) -> Iterator[None]:
        """Surround a job: at its end, wait for all messages."""
        with self.channel.job():
            yield

    def __call__(self, inner: RunForward, call: ForwardCall) -> torch.Tensor:
        """One call of the denoiser.

        Args:
            call: with both halves in the batch, or with one condition of several.

        Returns:
            The prediction as of a single rank; a patch tensor where that of the inner call is one, or where it comes
            from the other rank.

        Raises:
            UnsupportedCall: the batch is neither the pictures nor twice the pictures.
        """
        self.channel.turn()
        context, batch, pictures = call.context, call.latents.shape[0], call.context.pictures
        if batch == 2 * pictures:
            return self.each_patch(self.gather, context, inner(self.half(call)), 2)
        if batch != pictures:
            raise UnsupportedCall(
                f"the pipeline calls its {self.spec.checkpoint.denoiser} with a batch of {batch} for {pictures} "
                "pictures, which cfg cannot tell into a conditional and an unconditional half; drop cfg."
            )
        if context.branch.number % 2 == self.index:
            return self.each_patch(self.send, context, inner(call), 1)
        blank = inner(call.but(on_other_ranks=True))
        if isinstance(blank, PatchTensor):
            return self.each_patch(self.receive, context, blank, 1)
        return PatchTensor.make(
            [self.post(blank, Message(context.number)).wait],  # posted now: the other rank waits for its sends
            shape=blank.shape,
            dim=context.row_dim,
            bounds=(0, blank.shape[context.row_dim]),
            dtype=blank.dtype,
            device=blank.device,
            placement=LocalPlacement(),
        )

    def each_patch(
        self,
        exchange: Callable[[torch.Tensor, Message], torch.Tensor],
        context: ForwardContext,
        out: torch.Tensor,
        times: int,
    ) -> torch.Tensor:
        """Exchange a prediction with the other rank: now, or each patch when it is asked for, under a name that both
        ranks know.

        Args:
            exchange: of rows and their name.
            times: by how much the batch grows.
        """
        if not isinstance(out, PatchTensor):
            return exchange(out, Message(context.number))

        def one(patch: int, message: Message) -> torch.Tensor:
            return exchange(out.patch(patch), message)

        cells = [partial(one, patch, Message(context.number, patch)) for patch in range(out.patches)]
        shape = (times * out.shape[0], *out.shape[1:])
        made: torch.Tensor = PatchTensor.make(
            cells,
            shape=shape,
            dim=out.patched_dim,
            bounds=out.bounds,
            dtype=out.dtype,
            device=out.device,
            placement=out.placement,
        )
        return made

    def half(self, call: ForwardCall) -> ForwardCall:
        """The part of the batch that belongs to this rank, of every argument that has the batch."""
        batch = call.latents.shape[0]
        start, stop = self.index * batch // 2, (self.index + 1) * batch // 2

        def cut(x: torch.Tensor) -> torch.Tensor:
            return x if x.dim() == 0 or x.shape[0] != batch else x[start:stop]

        def part(name: str, value: Any) -> Any:
            if name in self.spec.unbatched_args:
                return value
            if self.spec.latents.list_inputs and isinstance(value, list) and len(value) == batch:
                return value[start:stop]
            return tree_map_only(torch.Tensor, cut, value)

        rest = {name: part(name, value) for name, value in call.rest.items()}
        return call.but(latents=call.latents[start:stop], rest=rest)

    def gather(self, mine: torch.Tensor, message: Message) -> torch.Tensor:
        """Exchange predictions ``[B/2, ...]``; return both as ``[B, ...]``."""
        halves = [self.channel.exchange(mine, self.peer, message).wait(), mine]
        return torch.cat(halves[:: -1 if self.index == 0 else 1])

    def send(self, mine: torch.Tensor, message: Message) -> torch.Tensor:
        """Send a prediction, which the other rank needs as well; return it."""
        self.channel.send(mine, self.peer, message)
        return mine

    def receive(self, blank: torch.Tensor, message: Message) -> torch.Tensor:
        """Receive a patch of the shape of ``blank`` from the other rank."""
        return self.post(blank, message).wait()

    def post(self, like: torch.Tensor, message: Message) -> Receive:
        """Post the receive of what the other rank sends under that name."""
        return self.channel.receive(like, like.shape[-2], -2, self.peer, message)
