"""The two halves of guidance on two ranks.

Shapes: latents and prediction ``[B, C, h, w]``; with batched guidance ``B`` is twice the number of pictures, the unconditional half first.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map_only

from xdit_core import Call, Channel, ForwardRun, LocalWorld, PatchTensor, Rank, UnsupportedCall, patchwise


class Guidance:
    """Splits batched guidance by the batch, separate calls by turns.

    Sends per rank and step: its prediction, ``B/2 x C x h x w`` elements, once.
    """

    def __init__(self, rank: Rank) -> None:
        self.rank, self.now, self.spec = rank, rank.now, rank.spec
        self.group, self.index = rank.group("cfg"), rank.index("cfg")
        self.peer = rank.mesh.ranks("cfg")[1 - self.index]
        groups = (self.group, rank.mesh.second_group("cfg"))  # one for each direction
        self.there = Channel(rank, groups[self.index], "cfg")
        self.here = Channel(rank, groups[1 - self.index], "cfg")
        self._halves: OrderedDict[int, tuple[torch.Tensor, torch.Tensor]] = OrderedDict()

    def begin(self) -> None:
        """A new request."""
        self._halves.clear()
        for channel in (self.there, self.here):
            channel.forget()

    def end(self) -> None:
        """Wait for every handle."""
        for channel in (self.there, self.here):
            channel.finish()
        self._halves.clear()

    def __call__(self, inner: ForwardRun, call: Call) -> torch.Tensor:
        """One call of the denoiser.

        Args:
            call: with both halves in the batch, or with one condition of several.

        Returns:
            The prediction as of a single rank; a patch tensor where that of the inner call is one, or where it comes from the other rank.

        Raises:
            UnsupportedCall: the batch is neither the pictures nor twice the pictures.
        """
        for channel in (self.there, self.here):
            channel.turn()
        batch, pictures = call.latents.shape[0], self.now.pictures
        if batch == 2 * pictures:
            return patchwise(self.gather, inner(self.half(call)))
        if batch != pictures:
            raise UnsupportedCall(
                f"the pipeline calls its {self.spec.denoiser} with a batch of {batch} for {pictures} pictures, which cfg cannot tell into "
                "a conditional and an unconditional half; drop cfg."
            )
        if self.now.branch % 2 == self.index:
            return patchwise(self.send, inner(call))
        blank = inner(call.but(elsewhere=True))
        if isinstance(blank, PatchTensor):
            return patchwise(self.receive, blank)
        rows = blank.shape[self.now.row_dim]
        return PatchTensor.make(
            [
                self.here.receive(blank, rows, self.now.row_dim, self.peer).wait
            ],  # posted now: the other rank waits for its sends
            shape=blank.shape,
            dim=self.now.row_dim,
            bounds=(0, rows),
            dtype=blank.dtype,
            device=blank.device,
            world=LocalWorld(),
        )

    def half(self, call: Call) -> Call:
        """The part of the batch that belongs to this rank, of every argument that has the batch."""
        batch = call.latents.shape[0]
        start, stop = self.index * batch // 2, (self.index + 1) * batch // 2

        def cut(x: torch.Tensor) -> torch.Tensor:
            if x.dim() == 0 or x.shape[0] != batch:
                return x
            known = self._halves.pop(id(x), None)
            if known is None or known[0] is not x:
                known = (x, x[start:stop])
            self._halves[id(x)] = known  # the same half each step, so that what was computed from it can be kept
            if len(self._halves) > 32:
                self._halves.popitem(last=False)
            return known[1]

        def part(name: str, value: Any) -> Any:
            if name in self.spec.unbatched:
                return value
            if self.spec.listed and isinstance(value, list) and len(value) == batch:
                return value[start:stop]
            return tree_map_only(torch.Tensor, cut, value)

        rest = {name: part(name, value) for name, value in call.rest.items()}
        return call.but(latents=call.latents[start:stop], rest=rest)

    def gather(self, mine: torch.Tensor) -> torch.Tensor:
        """``[B/2, ...]`` to ``[B, ...]``."""
        if not mine.numel():  # asked for the shape only
            return torch.cat((mine, mine))
        mine = mine.contiguous()
        halves = [torch.empty_like(mine), torch.empty_like(mine)]
        with self.rank.waiting("the other half of guidance", "cfg", self.group):
            dist.all_gather(halves, mine, group=self.group)
        self.rank.sent["cfg"] += mine.nbytes
        return torch.cat(halves)

    def send(self, mine: torch.Tensor) -> torch.Tensor:
        """A prediction that the other rank needs as well."""
        if mine.numel():
            self.there.send(mine, self.peer)
        return mine

    def receive(self, blank: torch.Tensor) -> torch.Tensor:
        """A patch of that shape from the other rank, which evaluates and sends it at the same place of the program."""
        if not blank.numel():
            return blank
        return self.here.receive(blank, blank.shape[self.now.row_dim], self.now.row_dim, self.peer).wait()
