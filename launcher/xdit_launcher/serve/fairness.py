"""The order of the queue: priority, then fair shares between keys, then age. Without torch."""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass

WEIGHT = 0.3  # of the newest measurement


@dataclass(frozen=True)
class Waiting:
    """A job in the queue.

    Args:
        id: of the job.
        number: grows with the time at which it was accepted.
        key: whose it is.
        priority: higher ones come first.
        deadline: ``time.time()`` after which nobody wants it.
        work: what its time is proportional to.
        attached: its client waits on the open connection.
    """

    id: str
    number: int
    key: str
    priority: int = 0
    deadline: float | None = None
    work: float = 1.0
    attached: bool = False


class FairQueue:
    """Jobs that wait. Of equal priority, the key that has got the least work comes first; of one key, the oldest job.

    A key that has asked for nothing for a while saves up no claim: it begins where the others stand.
    """

    def __init__(self) -> None:
        self._jobs: dict[str, Waiting] = {}
        self._got: dict[str, float] = {}  # work that each key has got
        self._order: list[Waiting] | None = None

    def __len__(self) -> int:
        return len(self._jobs)

    @property
    def next_work(self) -> float:
        """The work of the job that comes next."""
        order = self.order()
        return order[0].work if order else 0.0

    def add(self, job: Waiting, running: Collection[str] = ()) -> None:
        """Add a job.

        Args:
            running: keys of the jobs that are drawn.
        """
        active = {waiting.key for waiting in self._jobs.values()} | set(running)
        if job.key not in active:
            level = min((self._got.get(key, 0.0) for key in active), default=0.0)
            self._got = {key: value for key, value in self._got.items() if key in active}
            self._got[job.key] = level
        self._jobs[job.id] = job
        self._order = None

    def remove(self, id: str) -> bool:
        """Take a job out.

        Returns:
            Whether it was there.
        """
        self._order = None
        return self._jobs.pop(id, None) is not None

    def take(self) -> Waiting | None:
        """Take out the job that comes next, None if there is none."""
        order = self.order()
        if not order:
            return None
        job = order[0]
        self._got[job.key] = self._got.get(job.key, 0.0) + job.work
        self.remove(job.id)
        return job

    def expired(self, now: float) -> list[str]:
        """The ids of the jobs whose deadline has passed."""
        return [job.id for job in self._jobs.values() if job.deadline is not None and job.deadline < now]

    def order(self) -> list[Waiting]:
        """All jobs in the order in which they will run if nothing comes in between."""
        if self._order is None:
            self._order = arranged(list(self._jobs.values()), self._got)
        return self._order


def arranged(jobs: list[Waiting], got: dict[str, float]) -> list[Waiting]:
    """Jobs in the order in which they run.

    Args:
        got: work that each key has got so far.
    """
    spent, order = dict(got), []
    for priority in sorted({job.priority for job in jobs}, reverse=True):
        lines: dict[str, deque[Waiting]] = defaultdict(deque)
        for job in sorted(jobs, key=lambda job: job.number):
            if job.priority == priority:
                lines[job.key].append(job)
        while lines:
            key = min(lines, key=lambda key: (spent.get(key, 0.0), lines[key][0].number))
            job = lines[key].popleft()
            spent[key] = spent.get(key, 0.0) + job.work
            order.append(job)
            if not lines[key]:
                del lines[key]
    return order


class Pace:
    """How long work takes, from the jobs that have ended."""

    def __init__(self) -> None:
        self._seconds_per_work: float | None = None

    def measured(self, work: float, seconds: float) -> None:
        """A job of so much work has taken so long."""
        if work <= 0:
            return
        rate, before = seconds / work, self._seconds_per_work
        self._seconds_per_work = rate if before is None else WEIGHT * rate + (1 - WEIGHT) * before

    def seconds(self, work: float) -> float | None:
        """How long so much work will take, None if nothing was measured yet."""
        return None if self._seconds_per_work is None else self._seconds_per_work * work

    def until_end(self, ahead: Sequence[float], rests: Sequence[float]) -> float | None:
        """How long it will take until the last of several jobs has ended, None if nothing was measured yet.

        Args:
            ahead: the work of each, in the order in which they are drawn.
            rests: seconds for which each gang still draws what it has; none if there is no gang yet.
        """
        rate = self._seconds_per_work
        if rate is None:
            return None
        free, end = list(rests) or [0.0], 0.0
        heapq.heapify(free)
        for work in ahead:
            end = free[0] + rate * work
            heapq.heapreplace(free, end)
        return round(end, 1)
