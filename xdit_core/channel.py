"""Point-to-point messages between ranks: sends never block, receives are posted ahead, every handle is waited for."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from xdit_core.rank import Rank


class Channel:
    """Point-to-point messages in one direction; sends never block, every handle is waited for.

    Args:
        rank: this rank.
        group: a communicator in which nothing goes the other way.
        name: for the count of bytes.
        axis: to which its waits belong, by default that of its name.
    """

    def __init__(self, rank: Rank, group: dist.ProcessGroup | None, name: str, axis: str = "") -> None:
        self.rank, self.group, self.name, self.axis = rank, group, name, axis or name
        self._sends: list[tuple[Any, torch.Tensor]] = []
        self._older: list[tuple[Any, torch.Tensor]] = []
        self._receives: set[Receive] = set()
        self._sent, self._received = 0, 0
        self._host = group is not None and dist.get_backend(group) == "gloo"  # which sends from the memory of the host only
        if rank.trace is not None:
            self.send = self._traced  # type: ignore[method-assign]

    def send(self, x: torch.Tensor, to: int, what: str = "") -> None:
        """Send ``x`` to a global rank; it must not be written to any more."""
        x = x.contiguous().cpu() if self._host else x.contiguous()
        self._sent += 1
        work = dist.isend(x, to, group=self.group, tag=self._sent)
        self.rank.sent[self.name + what] += x.nbytes
        self._sends.append((work, x))

    def _traced(self, x: torch.Tensor, to: int, what: str = "") -> None:
        """`send`, seen."""
        assert self.rank.trace is not None
        with self.rank.trace.span(
            f"send {self.name}{what}", "send", self.axis, channel=self.name, peer=to, number=self._sent + 1, bytes=x.nbytes
        ):
            type(self).send(self, x, to, what)

    def receive(self, like: torch.Tensor, rows: int, dim: int, source: int) -> Receive:
        """Post a receive of a tensor shaped as ``like`` but with ``rows`` along ``dim``."""
        shape = list(like.shape)
        shape[dim] = rows
        self._received += 1
        buffer = torch.empty(shape, dtype=like.dtype, device="cpu" if self._host else like.device)
        work = dist.irecv(buffer, source, group=self.group, tag=self._received)
        receive = Receive(self, work, buffer, like.device, (self.name, source, self._received))
        self._receives.add(receive)
        return receive

    def done(self, receive: Receive) -> None:
        """A receive was waited for."""
        self._receives.discard(receive)

    def turn(self) -> None:
        """Another call of the denoiser begins: what was sent in the call before the last has arrived, so let go of it."""
        for work, _ in self._older:
            work.wait()
        self._older, self._sends = self._sends, []

    def finish(self) -> None:
        """Wait for whatever is still under way."""
        self.turn()
        self.turn()
        for receive in tuple(self._receives):
            receive.wait()

    def forget(self) -> None:
        """Drop the handles of a request that failed."""
        self._sends, self._older = [], []
        self._receives.clear()


class Receive:
    """A posted receive; ``message``: channel, source and number."""

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
