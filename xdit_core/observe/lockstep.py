"""A check for authors of strategies (``lockstep=yes``): before each collective its ranks compare what they are about to
do.

Ranks that decide differently (one leaves out the blocks of a step, the others do not) pair collectives that do not
belong together, or wait until the run's ``timeout`` for a rank that is not to blame. With this check the first
difference ends the run, and says which rank was where. Collectives are seen where torch dispatches them, whoever calls
them; messages between two ranks are not compared. Without the setting nothing of this is used.
"""

from __future__ import annotations

import json
import sys
import time
from datetime import timedelta
from types import CodeType
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from xdit_core.errors import LockstepError
from xdit_core.parallel.rank import Rank
from xdit_core.points.compose import BOUND, OwnedWrap, code_of
from xdit_core.points.forward import ForwardPoint
from xdit_core.points.trunk import Trunk

LOOK = timedelta(seconds=0.2)
MESSAGES = frozenset(("send", "recv_", "recv_any_source_"))
SAME_SHAPE = frozenset(
    ("allgather_", "_allgather_base_", "allreduce_", "broadcast_", "all_reduce", "all_gather_into_tensor", "broadcast")
)
BLOCKS, DENOISER = code_of(Trunk.run_blocks), code_of(ForwardPoint.base)


class Lockstep(TorchDispatchMode):
    """Compares collectives while it is active.

    Every rank writes under the number of the collective in its group what it is about to do, and waits for the entries
    of the others.

    Args:
        rank: this rank; of a run with several.
    """

    def __init__(self, rank: Rank) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._rank, self._me = rank, dist.get_rank()
        default = dist.distributed_c10d._get_default_store()
        engine = default.add(f"lockstep/engines/{self._me}", 1)  # the ranks make their engines in one order
        self._store = dist.PrefixStore(f"lockstep/{engine}", default)  # type: ignore[attr-defined]
        self._counts: dict[str, int] = {}
        self._picture = set(rank.plan.picture_axes)
        self._one_picture: dict[str, bool] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(t.__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl for t in types):
            # what a tensor of another kind does comes here when it does it; one that has a shape only does nothing
            return func(*args, **(kwargs or {})) if any(issubclass(t, FakeTensor) for t in types) else NotImplemented
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func.overloadpacket.__name__
            if name in MESSAGES:
                self.stand(name, [], "", waiting=False)
            elif (group := group_of(args)) is not None:
                self.compare(name, args, group)
        return func(*args, **(kwargs or {}))

    def compare(self, op: str, args: Any, group: Any) -> None:
        """Wait for the other ranks of a collective, and see that they are about to do the same.

        Raises:
            LockstepError: they are not, or one of them waits elsewhere for this one.
        """
        ranks = sorted(dist.get_process_group_ranks(group))
        number = self._counts[group.group_name] = self._counts.get(group.group_name, 0) + 1
        key = f"{group.group_name}/{number}"
        tensors = tensors_of(args)[:1]
        entry = {
            "op": op,
            "tensors": [[list(x.shape), str(x.dtype).removeprefix("torch.")] for x in tensors],
            "step": self._rank.context.step,
            "place": place(self._rank),
        }
        self._store.set(f"{key}/{self._me}", json.dumps(entry))
        self.stand(op, ranks, key, waiting=True)
        entries = {other: entry if other == self._me else self.entry_of(other, key, entry) for other in ranks}
        self.stand(op, ranks, key, waiting=False)
        alike = {self.comparable(e, group) for e in entries.values()}
        if len(alike) > 1:
            raise LockstepError(difference({r: told(e) for r, e in entries.items()}))
        if number > 1:  # which all have read, as all have come to the next
            self._store.delete_key(f"{group.group_name}/{number - 1}/{self._me}")

    def comparable(self, entry: dict[str, Any], group: Any) -> tuple[Any, ...]:
        """The parts of an entry that must be equal. Ranks that draw different pictures may be in different steps."""
        op = entry["op"]
        tensors = [(tuple(shape) if op in SAME_SHAPE else (), dtype) for shape, dtype in entry["tensors"]]
        return (op, *((entry["step"], entry["place"], *tensors) if self.share_picture(group) else ()))

    def share_picture(self, group: Any) -> bool:
        """Whether the ranks of a group work on one picture."""
        if group.group_name not in self._one_picture:
            where = [self._rank.plan.coordinates(rank) for rank in dist.get_process_group_ranks(group)]
            apart = [name for name in where[0] if name not in self._picture]
            self._one_picture[group.group_name] = len({tuple(w[name] for name in apart) for w in where}) == 1
        return self._one_picture[group.group_name]

    def stand(self, op: str, ranks: list[int], key: str, waiting: bool) -> None:
        """Tell the others where this rank is."""
        at = {"op": op, "tensors": [], "step": self._rank.context.step, "place": place(self._rank)}
        self._store.set(f"at/{self._me}", json.dumps({**at, "ranks": ranks, "key": key, "waiting": waiting}))

    def entry_of(self, other: int, key: str, own: dict[str, Any]) -> dict[str, Any]:
        """Wait for the entry of another rank and return it.

        Raises:
            LockstepError: it waits for this rank in another collective, or did not come within half of the run's
                ``timeout``.
        """
        end = time.monotonic() + self._rank.plan.run.patience / 2
        while True:
            try:
                self._store.wait([f"{key}/{other}"], LOOK)
                entry: dict[str, Any] = json.loads(self._store.get(f"{key}/{other}"))
                return entry
            except dist.DistStoreError:
                at = json.loads(self._store.get(f"at/{other}")) if self._store.check([f"at/{other}"]) else None
            waits_for_me = (
                at and at["waiting"] and at["key"] != key and self._me in at["ranks"] and not self.been_at(at["key"])
            )
            if waits_for_me or time.monotonic() > end:
                elsewhere = told(at) if at else "at no collective yet"
                raise LockstepError(difference({self._me: told(own), other: elsewhere}))

    def been_at(self, key: str) -> bool:
        """Whether this rank wrote its entry for a collective."""
        name, _, number = key.rpartition("/")
        return self._counts.get(name, 0) >= int(number)


def group_of(args: Any) -> Any:
    """The process group among the arguments of an operation, None if it is not about one."""
    for x in args:
        if isinstance(x, torch.ScriptObject):
            try:
                return dist.ProcessGroup.unbox(x)
            except RuntimeError:  # the operation of a reduction is such an object as well
                continue
    name: Any = next((x for x in reversed(args) if isinstance(x, str)), None)
    return None if name is None else dist.distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined]


def tensors_of(value: Any) -> list[torch.Tensor]:
    """The tensors among the arguments, in their order."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [x for part in value for x in tensors_of(part)] if isinstance(value, (list, tuple)) else []


def place(rank: Rank) -> str:
    """Find on the stack whose code is running, in words."""
    frame = sys._getframe(1)
    while frame is not None:
        code: CodeType = frame.f_code
        if code is BLOCKS:
            return f"block {rank.running.block}"
        if code is DENOISER:
            return "the denoiser beside its blocks"
        owned = frame.f_locals.get("owned") if code in BOUND else None
        if isinstance(owned, OwnedWrap):
            block = f", block {rank.running.block}" if owned.place.startswith("attention/") else ""
            return f"{owned.place} of {owned.owner.name}{block}"
        frame = frame.f_back  # type: ignore[assignment]
    return "the pipeline"


def told(entry: dict[str, Any]) -> str:
    """Where a rank is, in words."""
    tensors = "".join(f" of {shape} in {dtype}" for shape, dtype in entry["tensors"])
    return f"at {entry['op'].strip('_')}{tensors} in step {entry['step'] + 1}, {entry['place']}"


def difference(where: dict[int, str]) -> str:
    """The message of the error: where each rank is."""
    same: dict[str, list[int]] = {}
    for rank, text in sorted(where.items()):
        same.setdefault(text, []).append(rank)
    parts = [
        f"{'ranks' if len(r) > 1 else 'rank'} {', '.join(map(str, r))} {'are' if len(r) > 1 else 'is'} {t}"
        for t, r in same.items()
    ]
    return (
        f"ranks that must do the same have parted: {'; '.join(parts)}. A strategy decided differently on them; let it "
        "decide with rank.agree(...)."
    )
