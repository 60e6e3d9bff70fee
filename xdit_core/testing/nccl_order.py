"""The order that NCCL gives to operations, worked out from what each rank issued. Without torch.

A communicator runs its operations one after the other, as they were issued; an operation starts once the compute stream
has come to where it was issued, and the program itself waits for nothing; a send ends when its receive runs, and a
collective when all ranks run it. Gloo asks for nothing of this, so a program may pass on gloo and stand still on NCCL.
`check_order` runs the histories of all ranks by these rules, without time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

SHOWN = 3  # last operations of a rank that a message shows


class RuleBroken(RuntimeError):
    """Something that NCCL does not allow, or that would stand still or go wrong on it."""


@dataclass(frozen=True)
class Operation:
    """An operation as one rank issued it.

    Args:
        group: name of the communicator.
        ranks: global ranks of the communicator.
        kind: ``send``, ``recv`` or the name of a collective.
        shape, dtype: of what this rank gives, or receives.
        peer: global rank at the other end of a message, -1 for a collective.
        tag: of a message; NCCL ignores it, so that messages must be received in the order in which they are sent.
        batch: number that the messages of one ``batch_isend_irecv`` share, 0 for others.
        alike: what else must be the same on all ranks, such as the root.
        splits: of an all-to-all: how many rows go to each rank, and how many come from each; empty if they are equal.
    """

    group: str
    ranks: tuple[int, ...]
    kind: str
    shape: tuple[int, ...]
    dtype: str
    peer: int = -1
    tag: int = 0
    batch: int = 0
    alike: str = ""
    splits: tuple[tuple[int, ...], ...] = ()

    @property
    def message(self) -> bool:
        """Whether it is between two ranks."""
        return self.peer >= 0

    def __str__(self) -> str:
        way = {"send": f" to {self.peer}", "recv": f" from {self.peer}"}.get(self.kind, "")
        return f"{self.kind} of {list(self.shape)} {self.dtype}{way}" + (f" with {self.alike}" if self.alike else "")


@dataclass
class History:
    """What a rank did, in the order of its program: operations that it issued, and numbers of those that it waited for.

    ``wait()`` orders the compute stream behind an operation, and lets the program go on.
    """

    events: list[Operation | int] = field(default_factory=list)
    issued: int = 0

    def issue(self, operation: Operation) -> int:
        """Note an operation, and return its number."""
        self.events.append(operation)
        self.issued += 1
        return self.issued - 1

    def wait(self, number: int) -> None:
        """Note that an operation was waited for."""
        self.events.append(number)

    def to_json(self) -> list[Any]:
        """For `json.dumps`; ``from_json`` reads it."""
        return [event if isinstance(event, int) else asdict(event) for event in self.events]

    @staticmethod
    def from_json(events: Sequence[Any]) -> History:
        """Read what ``to_json`` wrote."""
        history = History()
        for event in events:
            if isinstance(event, int):
                history.wait(event)
                continue
            splits = tuple(map(tuple, event["splits"]))
            event = {**event, "ranks": tuple(event["ranks"]), "shape": tuple(event["shape"]), "splits": splits}
            history.issue(Operation(**event))
        return history


@dataclass
class Entry:
    """An operation, or the messages of one batch, in the queue of a communicator.

    Args:
        parts: numbers and operations that are not done.
        level: how much of its compute stream must be done before.
    """

    parts: list[tuple[int, Operation]]
    level: int
    batch: int


class Replay:
    """One rank while the histories are run.

    Args:
        rank: its number.
        history: what it did.
    """

    def __init__(self, rank: int, history: History) -> None:
        self.rank, self.events, self.issued = rank, history.events, 0
        self.queues: dict[str, deque[Entry]] = {}
        self.done: set[int] = set()
        self.stream: list[int] = []  # operations that the compute stream waits for, in order
        self.streamed = 0  # how many of them are done
        self.told: dict[str, list[Operation]] = {}

        self.issue()

    def issue(self) -> None:
        """Issue everything: the program waits for nothing of what a device does."""
        for event in self.events:
            if isinstance(event, int):
                self.stream.append(event)
                continue
            queue = self.queues.setdefault(event.group, deque())
            self.told.setdefault(event.group, []).append(event)
            if event.batch and queue and queue[-1].batch == event.batch:
                queue[-1].parts.append((self.issued, event))
            else:
                queue.append(Entry([(self.issued, event)], len(self.stream), event.batch))
            self.issued += 1

    def advance(self) -> bool:
        """Let the compute stream go on as far as possible; whether it went on at all."""
        before = self.streamed
        while self.streamed < len(self.stream) and self.stream[self.streamed] in self.done:
            self.streamed += 1
        return self.streamed != before

    def head(self, group: str) -> Entry | None:
        """What a communicator runs now on this rank."""
        queue = self.queues.get(group)
        return queue[0] if queue and queue[0].level <= self.streamed else None

    def finish(self, group: str, part: tuple[int, Operation]) -> None:
        """A part of the head of a communicator is done."""
        entry = self.queues[group][0]
        entry.parts.remove(part)
        self.done.add(part[0])
        if not entry.parts:
            self.queues[group].popleft()

    def story(self, group: str) -> str:
        """Its last operations in a communicator, up to the one that it cannot get done."""
        told = self.told.get(group, [])
        waiting = sum(len(entry.parts) for entry in self.queues.get(group, ()))
        end = len(told) - waiting + (1 if waiting else 0)
        shown = [str(operation) for operation in told[max(0, end - SHOWN) : end]]
        if not shown:
            return f"rank {self.rank} did nothing"
        last = f"{'waits in' if waiting else 'ended with'} {shown[-1]}"
        return f"rank {self.rank} {last}" + (f" (after {'; '.join(shown[:-1])})" if shown[:-1] else "")


def check_order(histories: Mapping[int, History], complete: bool = True) -> None:
    """Run what the ranks did by the rules of NCCL.

    Args:
        histories: by rank.
        complete: every rank came to its end.

    Raises:
        RuleBroken: two ranks do not fit together, or wait for each other for ever.
    """
    ranks = {rank: Replay(rank, history) for rank, history in histories.items()}
    moved = True
    while moved:
        moved = False
        for rank in ranks.values():
            moved |= rank.advance()
            for group in list(rank.queues):
                while run_head(rank, group, ranks):
                    moved = True
    stuck = [rank for rank in ranks.values() if any(rank.queues.values())]
    if stuck:
        raise RuleBroken(explain(stuck, ranks))
    if not complete:
        raise RuleBroken("the ranks timed out on gloo already, though their histories fit together")


def run_head(rank: Replay, group: str, ranks: Mapping[int, Replay]) -> bool:
    """Do what can be done of the head of a communicator; whether that was anything."""
    entry = rank.head(group)
    if entry is None:
        return False
    for part in entry.parts:
        operation = part[1]
        if not operation.message:
            return run_collective(group, [ranks[r] for r in operation.ranks if r in ranks], len(operation.ranks))
        other = ranks.get(operation.peer)
        theirs = other.head(group) if other is not None else None
        wanted = "recv" if operation.kind == "send" else "send"
        for match in theirs.parts if theirs is not None else ():
            if match[1].kind == wanted and match[1].peer == rank.rank and other is not None:
                compare_messages(rank, operation, other, match[1])
                rank.finish(group, part)
                other.finish(group, match)
                return True
    return False


def run_collective(group: str, members: Sequence[Replay], count: int) -> bool:
    """Do a collective if all ranks have come to it."""
    heads = [entry for member in members if (entry := member.head(group)) is not None]
    operations = [entry.parts[0][1] for entry in heads]
    if len(heads) < count or any(operation.message for operation in operations):
        return False
    first = operations[0]
    for member, operation in zip(members[1:], operations[1:], strict=True):
        same = ("kind", "dtype", "alike") if first.splits else ("kind", "dtype", "alike", "shape")
        if any(getattr(first, name) != getattr(operation, name) for name in same):
            raise RuleBroken(
                f"ranks {members[0].rank} and {member.rank} are in different collectives: "
                f"{members[0].story(group)}; {member.story(group)}; all ranks must issue the same in one order."
            )
    if first.splits:
        compare_splits(members, operations)
    for member, entry in zip(members, heads, strict=True):
        member.finish(group, entry.parts[0])
    return True


def compare_splits(members: Sequence[Replay], operations: Sequence[Operation]) -> None:
    """What each rank sends must be what the other expects.

    Raises:
        RuleBroken: it is not.
    """
    for i, mine in enumerate(operations):
        for j, other in enumerate(operations):
            if mine.splits[0][j] != other.splits[1][i]:
                raise RuleBroken(
                    f"rank {members[i].rank} gives {mine.splits[0][j]} rows to rank {members[j].rank}, which expects "
                    f"{other.splits[1][i]}, in {mine} and {other}; make the splits fit."
                )


def compare_messages(rank: Replay, mine: Operation, other: Replay, theirs: Operation) -> None:
    """A message must be what the receiver waits for.

    Raises:
        RuleBroken: it is not.
    """
    size, dtype = count(mine.shape) == count(theirs.shape), mine.dtype == theirs.dtype
    if not (size and dtype and mine.tag == theirs.tag):
        raise RuleBroken(
            f"a message of rank {rank.rank} and what rank {other.rank} expects differ: {mine} (tag {mine.tag}), "
            f"{theirs} (tag {theirs.tag}); {rank.story(mine.group)}; {other.story(mine.group)}; NCCL knows no tags, so "
            "receive in the order of the sends."
        )


def count(shape: Sequence[int]) -> int:
    """Elements of a tensor."""
    number = 1
    for size in shape:
        number *= size
    return number


def waits(rank: Replay) -> Iterator[tuple[str, int]]:
    """What a rank that stands still waits for: the communicators, and in each another rank."""
    for group, queue in rank.queues.items():
        if queue and queue[0].level <= rank.streamed:
            for _, operation in queue[0].parts:
                others = [operation.peer] if operation.message else [r for r in operation.ranks if r != rank.rank]
                yield from ((group, other) for other in others)


def explain(stuck: Sequence[Replay], ranks: Mapping[int, Replay]) -> str:
    """The sentence for ranks that stand still: two of them, one of which waits for the other."""
    pairs = [(rank, group, ranks[other]) for rank in stuck for group, other in waits(rank) if other in ranks]
    # a rank that is at something else in the same communicator says most
    pairs.sort(key=lambda pair: not any(group == pair[1] for group, _ in waits(pair[2])))
    if not pairs:
        return f"rank {stuck[0].rank} waits for ever on NCCL for a rank that is not there"
    rank, group, other = pairs[0]
    elsewhere = [name for name, _ in waits(other) if name != group]
    more = f", {other.story(elsewhere[0])} in another communicator" if elsewhere else ""
    return (
        f"ranks {rank.rank} and {other.rank} wait for each other for ever on NCCL, where a communicator does one thing "
        f"after the other: {rank.story(group)}; {other.story(group)}{more}; issue them in the same order, use "
        "batch_isend_irecv for both directions, or another communicator."
    )
