"""Messages from one rank to another: sends never block, receives are posted ahead, every handle is waited for.

A message is named by the call of the denoiser, the patch, and the part of the patch that it carries. So two ranks may
send and receive in different orders.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from xdit_core.observe.observer import Sending
from xdit_core.parallel.rank import Rank


@dataclass(frozen=True, slots=True)
class Message:
    """The name of a message, by which the receiver finds it.

    Args:
        call: ``ForwardContext.number`` of the call of the denoiser that it belongs to, which stands for job, step and
            branch.
        patch: of the picture, None for the whole.
        part: tells apart several messages of one patch: at most the number of blocks plus one.
    """

    call: int
    patch: int | None = None
    part: int = 0


class Channel:
    """Sends messages between two ranks. Sends never block, and every handle is waited for.

    Args:
        rank: this rank.
        group: a process group, which carries its messages one after the other: a message in the other direction is
            either exchanged with one (`exchange`), or posted in the same order on both ranks.
        name: under which the bytes sent are counted.
        axis: the axis of the mesh that its waits belong to, by default the one called ``name``.
    """

    def __init__(self, rank: Rank, group: dist.ProcessGroup | None, name: str, axis: str = "") -> None:
        self.rank, self.group, self.name, self.axis = rank, group, name, axis or name
        self._sends: list[tuple[Any, torch.Tensor]] = []
        self._older: list[tuple[Any, torch.Tensor]] = []
        self._receives: set[Receive] = set()
        # patches and parts that a call may have; a plan is asked for once
        self._patches, self._parts = rank.plan.patches + 1, rank.plan.facts.blocks + 2
        self._host = (
            group is not None and dist.get_backend(group) == "gloo"
        )  # which sends from the memory of the host only

    def tag(self, message: Message) -> int:
        """The number that stands for a message; it is used again only after so many calls that none of the same is
        under way."""
        patch = 0 if message.patch is None else message.patch + 1
        return ((message.call * self._patches + patch) * self._parts + message.part) % 2**31

    def send(self, x: torch.Tensor, to: int, message: Message, what: str = "") -> None:
        """Send ``x`` to a global rank; it must not be written to any more."""
        number = self.tag(message)
        with self.rank.observer.sending(Sending(self.name, self.axis, to, number, x.nbytes, what)):
            x = self._ready(x)
            work = dist.isend(x, to, group=self.group, tag=number)
            self.rank.sent[self.name + what] += x.nbytes
            self._sends.append((work, x))

    def exchange(self, x: torch.Tensor, peer: int, message: Message) -> Receive:
        """Send ``x``, and post the receive of a tensor of its shape from the same rank, as one operation."""
        number, device = self.tag(message), x.device
        with self.rank.observer.sending(Sending(self.name, self.axis, peer, number, x.nbytes)):
            x = self._ready(x)
            buffer = torch.empty_like(x)
            pair = ((dist.isend, x), (dist.irecv, buffer))
            works = dist.batch_isend_irecv([dist.P2POp(op, y, peer, self.group, number) for op, y in pair])
            self.rank.sent[self.name] += x.nbytes
            self._sends.append((works[0], x))
        return self._posted(works[-1], buffer, device, peer, number)  # NCCL has one handle for both

    def _ready(self, x: torch.Tensor) -> torch.Tensor:
        """A tensor as it can be sent."""
        return x.contiguous().cpu() if self._host else x.contiguous()

    def _posted(self, work: Any, buffer: torch.Tensor, device: torch.device, source: int, number: int) -> Receive:
        receive = Receive(self, work, buffer, device, (self.name, source, number))
        self._receives.add(receive)
        return receive

    def receive(self, like: torch.Tensor, rows: int, dim: int, source: int, message: Message) -> Receive:
        """Post a receive of a tensor shaped as ``like`` but with ``rows`` along ``dim``."""
        shape = list(like.shape)
        shape[dim] = rows
        tag = self.tag(message)
        buffer = torch.empty(shape, dtype=like.dtype, device="cpu" if self._host else like.device)
        work = dist.irecv(buffer, source, group=self.group, tag=tag)
        return self._posted(work, buffer, like.device, source, tag)

    def done(self, receive: Receive) -> None:
        """A receive was waited for."""
        self._receives.discard(receive)

    def turn(self) -> None:
        """Another call of the denoiser begins: what was sent in the call before the last has arrived, so let go of
        it."""
        for work, _ in self._older:
            work.wait()
        self._older, self._sends = self._sends, []

    @contextmanager
    def job(self) -> Iterator[None]:
        """Return a context manager to put around a job (one call of the pipeline). At the end it waits for all handles.

        After a job that failed nothing is waited for, as the other rank may be gone. The handles are kept until the
        next job, because a send whose handle is dropped before the other rank receives is never delivered.
        """
        self.forget()
        yield
        self.finish()

    def finish(self) -> None:
        """Wait for whatever is still under way."""
        self.turn()
        self.turn()
        for receive in tuple(self._receives):
            receive.wait()

    def forget(self) -> None:
        """Drop all handles."""
        self._sends, self._older = [], []
        self._receives.clear()


class Receive:
    """A message that is being received.

    Args:
        message: channel, source rank and number, for observers.
    """

    def __init__(
        self, channel: Channel, work: Any, buffer: torch.Tensor, device: torch.device, message: tuple[str, int, int]
    ) -> None:
        self._channel, self._work, self._buffer, self._device, self._message = channel, work, buffer, device, message

    def wait(self) -> torch.Tensor:
        """The tensor, once it is here."""
        if self._work is not None:
            with self._channel.rank.waiting(self._channel.name, self._channel.axis, message=self._message):
                self._work.wait()
            self._work, self._buffer = None, self._buffer.to(self._device)
            self._channel.done(self)
        return self._buffer
