"""What a server costs against ranks without one: ``python benchmarks/serving/costs.py``.

A server, another one with batches of 8, and a ``Gang`` answer the same requests in turn. Throughput is that of
requests that are there at once, as a ratio to the gang's. Latency is what a tiny request takes longer over HTTP. Each
rank has one core, so that the server and its clients have another.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from http.client import HTTPConnection
from typing import Any

import httpx
from server import Server, wait

from xdit_launcher import Gang

PLAN = {"model": "emoji", "device": "cpu", "threads": 1}
SIZES = ((64, 64), (64, 128), (128, 128))  # height and width
STEPS = (2, 4, 8)
TINY = {"height": 32, "width": 32, "steps": 1}
PROMPTS = ("red heart", "rocket", "cat", "green apple")
BATCH, CLIENTS = 8, 16
LEAST_ALONE, LEAST_BATCHED, MOST_ADDED = 0.95, 1.5, 5.0  # of the gang's throughput; milliseconds
Request = dict[str, Any]


def requests(count: int, seed: int) -> list[Request]:
    """Requests of mixed sizes, the same for each seed."""
    draw, made = random.Random(seed), []
    for i in range(count):
        height, width = draw.choice(SIZES)
        sizes = {"height": height, "width": width, "steps": draw.choice(STEPS)}
        made.append({"prompt": draw.choice(PROMPTS), **sizes, "seed": i})
    return made


def seconds(work: Callable[..., object], *arguments: object) -> float:
    """Time of a call."""
    begun = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - begun


def drawn(gang: Gang, some: Sequence[Request]) -> None:
    """Let a gang answer requests that are there at once."""
    for job in [gang.submit(each["prompt"], **{k: v for k, v in each.items() if k != "prompt"}) for each in some]:
        job.result()


def served(http: httpx.Client, some: Sequence[Request]) -> None:
    """Let a server answer requests that are there at once."""

    def send(request: Request) -> str:
        return str(http.post("/v1/jobs", json=request).raise_for_status().json()["id"])

    with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
        for id in list(pool.map(send, some)):
            assert wait(http, id)["status"] == "done"


def asked(connection: HTTPConnection, request: Request) -> None:
    """Let a server answer a request on an open connection, with a client that costs next to nothing itself."""
    size = f"{request['width']}x{request['height']}"
    body = {"size": size, **{name: value for name, value in request.items() if name not in ("height", "width")}}
    connection.request("POST", "/v1/images/generations", json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    assert answer.status == 200 and answer.read()


def costs(folder: str, count: int, rounds: int, seed: int = 0) -> dict[str, float]:
    """Measure.

    Args:
        count: requests of a round.
        rounds: how often server and gang take turns.

    Returns:
        ``alone`` and ``batched``: throughput of the server as a ratio to the gang's, the median of the rounds; ``added
        ms``: the median of pairs of tiny requests; ``gang ms``: of such a request without a server.
    """
    settings = {**PLAN, "serve.queue": 100_000}
    single = Server(f"{folder}/single", settings).ready()
    batches = Server(f"{folder}/batches", {**settings, "serve.batch": BATCH}).ready()
    alike = [{**each, "height": 64, "width": 64, "steps": 4} for each in requests(count, seed)]
    alone, batched, pairs = [], [], []
    with Gang([], {**PLAN, "runs": f"{folder}/runs"}) as gang, single.client() as one, batches.client() as many:
        for turn in range(rounds + 1):  # the first is a warm-up
            mixed = requests(count, seed + turn)
            alone.append(seconds(drawn, gang, mixed) / seconds(served, one, mixed))
            batched.append(seconds(drawn, gang, alike) / seconds(served, many, alike))
        connection = HTTPConnection(single.url.removeprefix("http://"))
        for i in range(20 * rounds):
            tiny = {"prompt": PROMPTS[0], **TINY, "seed": i}
            pairs.append((seconds(drawn, gang, [tiny]), seconds(asked, connection, tiny)))
        connection.close()
    for server in (single, batches):
        server.end()
    return {
        "alone": statistics.median(alone[1:]),
        "batched": statistics.median(batched[1:]),
        "added ms": 1000 * statistics.median(there - here for here, there in pairs),
        "gang ms": 1000 * statistics.median(here for here, _ in pairs),
    }


def shortcomings(measured: dict[str, float]) -> list[str]:
    """What is worse than it should be."""
    bars = (
        (measured["alone"] >= LEAST_ALONE, f"throughput is below {LEAST_ALONE} of that of a gang"),
        (measured["batched"] >= LEAST_BATCHED, f"throughput of batches is below {LEAST_BATCHED} of that of a gang"),
        (measured["added ms"] < MOST_ADDED, f"a request takes {MOST_ADDED:g} ms longer, or more"),
    )
    return [sentence for good, sentence in bars if not good]


def main() -> None:
    """Measure, print, and fail if it is worse than it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int, nargs="?", default=50, help="requests of a round")
    parser.add_argument("--rounds", type=int, default=7)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measured = costs(folder, chosen.count, chosen.rounds)
    print(json.dumps({name: round(value, 3) for name, value in measured.items()}, indent=1))
    if found := shortcomings(measured):
        raise SystemExit("\n".join(found))


if __name__ == "__main__":
    main()
