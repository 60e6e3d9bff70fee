"""How waiting grows with the number of gangs: a simulation of a server with 1 to 1,000 of them, from measured times.

``python benchmarks/serving/simulation.py`` prints the tables of ``docs/measured/serving.md``. Jobs come at random
(Poisson), and each takes one of the given times. Three ways to hand them out are compared: one queue of which every
free gang takes the next job, which is what ``xdit-launch serve`` does; a queue at each gang, where a job goes to the
shorter of two that are chosen at random; and a queue at each gang that is chosen at random. The server itself needs
time for each job too. ``benchmarks/serving/load.py`` measures a real one.
"""

from __future__ import annotations

import argparse
import heapq
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

GANGS = (1, 4, 16, 64, 256, 1000)
LOADS = (0.5, 0.8, 0.95)
JOBS_PER_GANG, LEAST_JOBS = 200, 40_000


@dataclass(frozen=True)
class Measured:
    """What was measured.

    Args:
        seconds: for which gangs drew jobs, each as likely as the others.
        front: seconds of a processor that the server itself needs for a job.
        load: seconds until a gang that is started answers.
    """

    seconds: tuple[float, ...]
    front: float
    load: float

    @property
    def mean(self) -> float:
        """Seconds of the average job."""
        return sum(self.seconds) / len(self.seconds)


def arrivals(rate: float, count: int, draw: random.Random) -> Iterator[float]:
    """Times at which jobs come, ``rate`` a second on average."""
    now = 0.0
    for _ in range(count):
        now += draw.expovariate(rate)
        yield now


def through_front(times: Iterator[float], front: float) -> Iterator[tuple[float, float]]:
    """For each job when it came, and when the server, which has one thread for all, has put it in the queue."""
    free = 0.0
    for time in times:
        free = max(free, time) + front
        yield time, free


def one_queue(jobs: Iterator[tuple[float, float]], gangs: int, measured: Measured, draw: random.Random) -> list[float]:
    """Waits, if a free gang takes the next job of one queue."""
    free, waits = [0.0] * gangs, []
    for came, queued in jobs:
        begin = max(queued, free[0])
        heapq.heapreplace(free, begin + draw.choice(measured.seconds))
        waits.append(begin - came)
    return waits


def shortest_of(choices: int) -> Callable[..., list[float]]:
    """Waits, if each gang has a queue and a job goes to the shortest of some that are chosen at random."""

    def simulate(
        jobs: Iterator[tuple[float, float]], gangs: int, measured: Measured, draw: random.Random
    ) -> list[float]:
        ends: list[deque[float]] = [deque() for _ in range(gangs)]  # of the jobs of each gang that have not ended
        waits = []
        for came, queued in jobs:
            chosen = [ends[draw.randrange(gangs)] for _ in range(choices)]
            for queue in chosen:
                while queue and queue[0] <= queued:
                    queue.popleft()
            queue = min(chosen, key=len)
            begin = queue[-1] if queue else queued
            queue.append(begin + draw.choice(measured.seconds))
            waits.append(begin - came)
        return waits

    return simulate


WAYS = (("one queue", one_queue), ("shorter of two", shortest_of(2)), ("at random", shortest_of(1)))


def part(values: Sequence[float], fraction: float) -> float:
    """The value below which this fraction of all lies."""
    return sorted(values)[min(len(values) - 1, int(fraction * len(values)))]


def queueing(measured: Measured, seed: int) -> Iterator[str]:
    """A table of waits by number of gangs, load and way, as a multiple of the average job."""
    yield "| gangs | load | " + " | ".join(f"{name} p50 | p99" for name, _ in WAYS) + " |"
    yield "|---|---|" + "---|---|" * len(WAYS)
    free = Measured(measured.seconds, 0.0, measured.load)
    for gangs in GANGS:
        for load in LOADS:
            cells = []
            for _, simulate in WAYS:
                draw = random.Random(seed)
                count = max(LEAST_JOBS, JOBS_PER_GANG * gangs)
                times = arrivals(load * gangs / measured.mean, count, draw)
                waits = simulate(through_front(times, 0.0), gangs, free, draw)[count // 5 :]  # it began empty
                cells += [f"{part(waits, fraction) / measured.mean:.2f}" for fraction in (0.5, 0.99)]
            yield f"| {gangs} | {load:g} | " + " | ".join(cells) + " |"


def front(measured: Measured, seed: int, load: float = 0.8) -> Iterator[str]:
    """A table of waits with the time of the server, by number of gangs and average time of a job."""
    means = (measured.mean, 10.0, 60.0)
    yield "| gangs | " + " | ".join(f"jobs of {mean:.3g} s: server busy | wait p99" for mean in means) + " |"
    yield "|---|" + "---|---|" * len(means)
    for gangs in GANGS:
        cells = []
        for mean in means:
            rate = load * gangs / mean
            if rate * measured.front >= 1:
                cells += [f"{rate * measured.front:.0%}", "grows"]
                continue
            draw = random.Random(seed)
            scaled = Measured(tuple(s * mean / measured.mean for s in measured.seconds), measured.front, 0.0)
            count = max(LEAST_JOBS, JOBS_PER_GANG * gangs)
            times = through_front(arrivals(rate, count, draw), measured.front)
            waits = one_queue(times, gangs, scaled, draw)[count // 5 :]
            cells += [f"{rate * measured.front:.1%}", f"{part(waits, 0.99):.2f} s"]
        yield f"| {gangs} | " + " | ".join(cells) + " |"


def scaled(measured: Measured, most: int, idle: float, draw: random.Random) -> tuple[list[float], float]:
    """From one gang to ``most`` of them as the queue needs: an hour at a tenth of the load, one at 0.8, one at a tenth.

    Args:
        idle: seconds without a job after which a gang ends.

    Returns:
        The waits of all jobs, and the hours of all gangs together.
    """
    hour, jobs = 3600.0, []
    for number, load in enumerate((0.08, 0.8, 0.08)):
        times = arrivals(load * most / measured.mean, int(load * most / measured.mean * hour * 1.2), draw)
        jobs += [number * hour + time for time in times if time < hour]
    free = [0.0]  # when each gang has drawn what it has got, or has loaded
    waits, used = [], 0.0
    since = [0.0]  # when each was started
    for came in jobs:
        while len(free) > 1 and came - free[-1] > idle:  # jobs go to the first gang that is free, so the last one rests
            used += free.pop() + idle - since.pop()
        gang = next((number for number, time in enumerate(free) if time <= came), None)
        if gang is None and len(free) < most:
            free.append(came + measured.load)
            since.append(came)
        if gang is None:
            gang = min(range(len(free)), key=free.__getitem__)
        begin = max(came, free[gang])
        free[gang] = begin + draw.choice(measured.seconds)
        waits.append(begin - came)
    used += sum(3 * hour - start for start in since)
    return waits, used / hour


def scaling(measured: Measured, seed: int) -> Iterator[str]:
    """A table of what scaling costs in waits, and saves in hours of gangs."""
    yield "| most gangs | `serve.idle` | wait p50 | p99 | longest | hours of gangs | if all ran always |"
    yield "|---|---|---|---|---|---|---|"
    for most in (4, 16, 32):
        for idle in (30.0, 300.0):
            waits, hours = scaled(measured, most, idle, random.Random(seed))
            cells = [f"{value:.2f} s" for value in (part(waits, 0.5), part(waits, 0.99), max(waits))]
            yield f"| {most} | {idle:g} s | " + " | ".join(cells) + f" | {hours:.1f} | {3 * most} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="How waiting grows with the number of gangs.")
    parser.add_argument("--seconds", default="0.31,0.54,0.54,0.54,1.05", help="times of jobs, equally likely")
    parser.add_argument("--front", type=float, default=0.021, help="seconds that the server needs for a job")
    parser.add_argument("--load", type=float, default=8.0, help="seconds until a gang that is started answers")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    measured = Measured(tuple(float(text) for text in given.seconds.split(",")), given.front, given.load)
    tables = (("Queueing, in average jobs", queueing), ("The server itself, at load 0.8", front), ("Scaling", scaling))
    for title, table in tables:
        print(f"\n## {title}\n")
        for line in table(measured, given.seed):
            print(line, flush=True)


if __name__ == "__main__":
    main()
