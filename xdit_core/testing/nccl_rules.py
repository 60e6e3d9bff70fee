"""A backend of ``torch.distributed`` for tests: gloo, with the rules of NCCL, for tensors in host memory.

- Tensors are contiguous, and objects are not gathered over a communicator of the device.
- What is received is there after ``wait()`` and not before: until then the tensor holds NaN.
- Nobody writes to a tensor between the start of an operation and its ``wait()``.
- All ranks issue the same collectives in one order, and messages such that no communicator waits for itself; see
  `nccl_order`, which `check` asks at the end.

Example::

    gloo.run(task, world=2, nccl_rules=True)
"""

from __future__ import annotations

import ctypes
import inspect
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import FrameType, MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PythonCallbackWork

from xdit_core.faults import lost_peer
from xdit_core.testing.nccl_order import History, Operation, RuleBroken, check_order

NAME = "nccl_rules"
PATIENCE = timedelta(seconds=5)  # for the histories of ranks after one of them timed out
DEPTH = 8  # frames from a call of torch.distributed to the process group
OBJECTS = MappingProxyType(
    {
        inspect.unwrap(function).__code__: function.__name__
        for function in (
            dist.all_gather_object,
            dist.gather_object,
            dist.broadcast_object_list,
            dist.scatter_object_list,
            dist.send_object_list,
            dist.recv_object_list,
        )
    }
)
BATCH = inspect.unwrap(dist.batch_isend_irecv).__code__


class Flight:
    """An operation that was started.

    Args:
        recorder: of this rank.
        number: of the operation in its history.
        operation: what it is.
        work: handle of gloo.
        given: tensors that it reads.
        received: pairs of a tensor of the caller, and the one that gloo writes to.
    """

    def __init__(
        self,
        recorder: Recorder,
        number: int,
        operation: Operation,
        work: Any,
        given: Sequence[torch.Tensor],
        received: Sequence[tuple[torch.Tensor, torch.Tensor]],
    ) -> None:
        self.recorder, self.number, self.operation, self.work = recorder, number, operation, work
        self.received = received
        self.before = [(x, mark(x)) for x in (*given, *(target for target, _ in received))]
        self.over = False
        recorder.flights.append(self)

    def wait(self, timeout: timedelta) -> bool:
        """Let what follows see the result."""
        if self.over:
            return True
        if timeout:
            self.work.wait(timeout)
        else:
            self.work.wait()
        self.check()
        with torch.no_grad():
            for target, buffer in self.received:
                target.copy_(buffer)
        self.over, self.before, self.received = True, [], ()
        self.recorder.flights.remove(self)
        self.recorder.history.wait(self.number)
        return True

    def check(self) -> None:
        """See that nobody wrote to its tensors.

        Raises:
            RuleBroken: somebody did.
        """
        if any(mark(x) != before for x, before in self.before):
            raise RuleBroken(
                f"a tensor was written to while rank {self.recorder.rank} was in {self.operation} with it; "
                f"wait for the operation first, or give it a copy (its history: {self.recorder.story()})."
            )


def mark(x: torch.Tensor) -> tuple[int, bytes]:
    """What changes when a contiguous tensor is written to."""
    version = 0 if x.is_inference() else x._version
    return version, ctypes.string_at(x.data_ptr(), x.nbytes)


class Recorder:
    """What this rank did with the groups of the backend."""

    def __init__(self) -> None:
        self.rank, self.history = 0, History()
        self.flights: list[Flight] = []
        self._batch: FrameType | None = None
        self._batches = 0

    def batch(self, frame: FrameType | None) -> int:
        """The number of a call of ``batch_isend_irecv``, 0 for none."""
        if frame is not None and frame is not self._batch:
            self._batches += 1
        self._batch = frame  # held, so that no other frame takes its place in memory
        return self._batches if frame is not None else 0

    def story(self) -> str:
        """The last operations of this rank."""
        return "; ".join(str(event) for event in self.history.events[-6:] if isinstance(event, Operation))


RECORDER = Recorder()  # torch makes groups by the name of a backend, and gives it nothing of ours


class RulesGroup(dist.ProcessGroup):
    """A process group that hands everything to gloo and keeps to the rules of NCCL."""

    def __init__(self, options: Any) -> None:
        super().__init__(options.group_rank, options.group_size)  # type: ignore[call-arg]
        self.ranks = tuple(options.global_ranks_in_group) or tuple(range(options.group_size))
        self.recorder, self.label = RECORDER, str(options.group_id)
        self.recorder.rank = self.ranks[options.group_rank]
        self.gloo: Any = dist.ProcessGroupGloo(
            options.store, options.group_rank, options.group_size, timeout=options.timeout
        )

    @property
    def group_name(self) -> str:  # type: ignore[override]
        """The name under which torch knows this group."""
        return self.label

    def getBackendName(self) -> str:
        """The name of the backend."""
        return NAME

    def _get_backend(self, device: torch.device) -> Any:
        return self.gloo

    def _start(
        self,
        kind: str,
        call: Callable[..., Any],
        given: Sequence[torch.Tensor],
        received: Sequence[torch.Tensor],
        **more: Any,
    ) -> Any:
        """Start an operation.

        Args:
            call: takes buffers in place of what is received, and returns the handle of gloo.
            given: tensors that it only reads.
            received: tensors that it writes; those that it reads as well are in ``both`` of ``more``.
        """
        both = more.pop("both", False)
        for x in (*given, *received):
            if not x.is_contiguous():
                raise RuleBroken(
                    f"rank {self.recorder.rank} gives {kind} a tensor of {list(x.shape)} that is not contiguous "
                    f"(strides {list(x.stride())}), which NCCL refuses; call contiguous()."
                )
        frames = caller()
        for frame in frames:
            if frame.f_code in OBJECTS:
                raise RuleBroken(
                    f"rank {self.recorder.rank} calls {OBJECTS[frame.f_code]} over a communicator of the device, where "
                    "it waits for copies to and from the device; use a gloo group beside it, Mesh.host_group."
                )
        batch = self.recorder.batch(next((frame for frame in frames if frame.f_code is BATCH), None))
        x = (*given, *received)[0]
        operation = Operation(
            self.label, self.ranks, kind, tuple(x.shape), str(x.dtype).removeprefix("torch."), batch=batch, **more
        )
        number = self.recorder.history.issue(operation)
        buffers = [target.clone() for target in received]
        work = call(*buffers)
        for target in () if both else received:
            if target.is_floating_point():
                target.fill_(float("nan"))
        flight = Flight(self.recorder, number, operation, work, given, list(zip(received, buffers, strict=True)))
        return PythonCallbackWork(flight.wait)

    def send(self, tensors: Any, peer: int, tag: int) -> Any:  # type: ignore[override]
        """A message to a rank of the group."""
        return self._start(
            "send", lambda: self.gloo.send(tensors, peer, tag), tensors, [], peer=self.ranks[peer], tag=tag
        )

    def recv(self, tensors: Any, peer: int, tag: int) -> Any:  # type: ignore[override]
        """A message from a rank of the group."""
        more = {"peer": self.ranks[peer], "tag": tag}
        return self._start("recv", lambda *buffers: self.gloo.recv(list(buffers), peer, tag), [], tensors, **more)

    def allreduce(self, tensors: Any, opts: Any = None) -> Any:  # type: ignore[override]
        """Sum, or another reduction, in place."""
        opts = opts or dist.AllreduceOptions()
        call = lambda *buffers: self.gloo.allreduce(list(buffers), opts)  # noqa: E731
        return self._start(
            "all_reduce", call, [], tensors, both=True, alike=str(getattr(opts.reduceOp, "op", opts.reduceOp))
        )

    def allreduce_coalesced(self, tensors: Any, opts: Any = None) -> Any:  # type: ignore[override]
        """Several reductions."""
        return together([self.allreduce([x], opts) for x in tensors])

    def broadcast(self, tensors: Any, opts: Any) -> Any:  # type: ignore[override]
        """From one rank to all, in place."""
        call = lambda *buffers: self.gloo.broadcast(list(buffers), opts)  # noqa: E731
        return self._start("broadcast", call, [], tensors, both=True, alike=f"root {opts.rootRank}")

    def allgather(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:  # type: ignore[override]
        """Every rank's tensor to all ranks."""
        call = lambda *buffers: self.gloo.allgather([list(buffers)], inputs)  # noqa: E731
        return self._start("all_gather", call, inputs, outputs[0])

    def all_gather_single(self, output: Any, given: Any, opts: Any = None) -> Any:  # type: ignore[override]
        """Every rank's tensor to all ranks, into one."""
        call = lambda buffer: self.gloo.allgather([list(buffer.chunk(len(self.ranks)))], [given])  # noqa: E731
        return self._start("all_gather_single", call, [given], [output])

    def all_gather_single_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:  # type: ignore[override]
        """Several gathers."""
        return together([self.all_gather_single(*pair) for pair in zip(outputs, inputs, strict=True)])

    def all_to_all_single(self, output: Any, given: Any, out_splits: Any, in_splits: Any, opts: Any = None) -> Any:  # type: ignore[override]
        """A part of every rank's tensor to each rank."""
        call = lambda buffer: self.gloo.alltoall_base(buffer, given, list(out_splits), list(in_splits))  # noqa: E731
        splits = (tuple(in_splits), tuple(out_splits)) if in_splits or out_splits else ()
        return self._start("all_to_all", call, [given], [output], splits=splits)

    def barrier(self, opts: Any = None) -> Any:  # type: ignore[override]
        """Wait for all ranks; NCCL sums a number."""
        return self.allreduce([torch.zeros(1)])


def together(works: Sequence[Any]) -> Any:
    """One handle for several."""
    return works[0] if len(works) == 1 else PythonCallbackWork(lambda timeout: all(work.wait() for work in works))


def caller() -> list[FrameType]:
    """The frames from here to the code that called ``torch.distributed``."""
    frames: list[FrameType] = []
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and len(frames) < DEPTH:
        frames.append(frame)
        frame = frame.f_back
    return frames


def register() -> None:
    """Make the backend known to torch, and forget what this rank did."""
    RECORDER.__init__()  # type: ignore[misc]
    if NAME.upper() not in dist.Backend._plugins:
        dist.Backend.register_backend(NAME, lambda o, _: RulesGroup(o), extended_api=True, devices=["cpu"])


@contextmanager
def checked(store: Any, rank: int, world: int) -> Iterator[None]:
    """Surround what a rank does with the groups of the backend, and `check` it at the end, or after a timeout.

    Args:
        store: as of `check`.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, RuleBroken) and lost_peer(error):
            with suppress(dist.DistStoreError):
                check(store, rank, world, complete=False)
        raise
    check(store, rank, world)


def check(store: Any, rank: int, world: int, complete: bool = True) -> None:
    """Compare what all ranks did, at the end of what they did.

    Args:
        store: that all ranks can write and read.
        complete: this rank came to its end.

    Raises:
        RuleBroken: a rule of NCCL was broken.
    """
    for flight in RECORDER.flights if complete else ():
        flight.check()
    store.set(f"history/{rank}", json.dumps([complete, RECORDER.history.to_json()]))
    store.wait([f"history/{r}" for r in range(world)], *(() if complete else (PATIENCE,)))
    read = {r: json.loads(store.get(f"history/{r}")) for r in range(world)}
    histories = {r: History.from_json(events) for r, (_, events) in read.items()}
    check_order(histories, all(done for done, _ in read.values()))
