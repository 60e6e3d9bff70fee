"""How much faster a gang is that draws waiting requests together: ``python benchmarks/serving/batching.py 8 4``.

The gangs of one process and of batches of up to 8 take turns; each turn sends 24 requests at once, and the ratio of
their times is printed, with the time of each request.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Mapping
from typing import Any

from xdit_launcher import Gang

REQUESTS = 24
PROMPTS = ("red heart", "rocket", "cat", "green apple")


def seconds(gang: Gang, count: int, settings: Mapping[str, Any]) -> float:
    """Time for some requests that are there at once."""
    started = time.perf_counter()
    jobs = [gang.submit(PROMPTS[i % len(PROMPTS)], seed=i, **settings) for i in range(count)]
    for job in jobs:
        job.result()
    return time.perf_counter() - started


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("batch", type=int, nargs="?", default=8)
    parser.add_argument("turns", type=int, nargs="?", default=4)
    parser.add_argument("--size", type=int, default=None, help="pixels of a side")
    parser.add_argument("--steps", type=int, default=4)
    chosen = parser.parse_args()
    settings = {"steps": chosen.steps} | ({"height": chosen.size, "width": chosen.size} if chosen.size else {})
    with tempfile.TemporaryDirectory() as runs:
        plan = {"model": "emoji", "device": "cpu", "runs": runs}
        with Gang((), plan) as single, Gang((), plan, batch=chosen.batch) as batched:
            for gang in (single, batched):
                seconds(gang, chosen.batch, settings)
            pairs = []
            for _ in range(chosen.turns):
                pairs.append((seconds(single, REQUESTS, settings), seconds(batched, REQUESTS, settings)))
                one, many = (1000 * value / REQUESTS for value in pairs[-1])
                print(f"one by one {one:6.1f} ms, together {many:6.1f} ms a request: {one / many:.2f} x", flush=True)
    print(f"median {statistics.median(a / b for a, b in pairs):.2f} x with batches of up to {chosen.batch}")


if __name__ == "__main__":
    main()
