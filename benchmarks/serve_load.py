"""Requests of all kinds against a server, well and badly behaved: every accepted job must end.

``python benchmarks/serve_load.py 200`` sends 200 requests of mixed sizes, of which some are cancelled, wrong or left by
their client, and kills a rank in the middle. It prints how the jobs ended, the throughput as a ratio to that of a
``Gang`` without a server, and the time that the server adds to a request.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import httpx
import psutil

from xdit_core.testing.models import save_tiny_sd3
from xdit_launcher import Gang

SIZES = ((32, 32), (16, 32), (32, 48))
STEPS = (2, 4, 8)
ENDED = ("done", "failed", "cancelled")


def words(folder: str) -> dict[str, object]:
    return {"model": "sd3", "model.path": folder, "max_sequence_length": 5, "device": "cpu"}


def bodies(count: int, seed: int) -> list[dict[str, object]]:
    """Requests that are right, the same for each seed."""
    draw = random.Random(seed)
    made = []
    for i in range(count):
        height, width = draw.choice(SIZES)
        made.append({"prompt": f"fox {i}", "height": height, "width": width, "steps": draw.choice(STEPS), "seed": i})
    return made


class Server:
    """A server over one rank."""

    def __init__(self, folder: str, queue: int) -> None:
        settings = [f"{name}={value}" for name, value in words(folder).items()]
        command = [sys.executable, "-m", "xdit_launcher.cli", "serve", "--port", "0", "--data", f"{folder}/data"]
        self.log = open(f"{folder}/log", "wb")  # noqa: SIM115
        self.process = subprocess.Popen(
            [*command, *settings, f"serve.queue={queue}"], stdout=subprocess.PIPE, stderr=self.log, text=True
        )
        assert self.process.stdout is not None
        self.http = httpx.Client(base_url=self.process.stdout.readline().split()[-1], timeout=600)
        while self.http.get("/ready").status_code != 200:
            time.sleep(0.1)

    def kill_a_rank(self) -> None:
        below = psutil.Process(self.process.pid).children(recursive=True)
        next(process for process in below if "xdit_core.worker" in " ".join(process.cmdline())).kill()

    def memory(self) -> float:
        """MiB of the server alone."""
        return psutil.Process(self.process.pid).memory_info().rss / 2**20

    def end(self) -> None:
        self.process.terminate()
        self.process.wait(120)
        self.log.close()


def added(server: Server, folder: str, requests: list[dict[str, object]]) -> tuple[float, float]:
    """Throughput as a ratio to that of a gang alone, and the milliseconds that a request takes longer: medians of
    requests, and of rounds of ten, that the server and the gang answer in turn."""
    differences, ratios = [], []
    with Gang([], {**words(folder), "runs": f"{folder}/runs"}) as gang:

        def draw(request: dict[str, object]) -> None:
            settings = {name: value for name, value in request.items() if name != "prompt"}
            gang.generate(str(request["prompt"]), progress=False, **settings)

        def ask(request: dict[str, object]) -> None:
            extra = {name: value for name, value in request.items() if name not in ("height", "width")}
            size = f"{request['width']}x{request['height']}"
            server.http.post("/v1/images/generations", json={**extra, "size": size}).raise_for_status()

        for request in requests:  # sizes that are new take longer
            draw(request)
            ask(request)
        for request in requests:
            differences.append(1000 * (timed(lambda r=request: ask(r)) - timed(lambda r=request: draw(r))))
        for start in range(0, len(requests), 10):
            some = requests[start : start + 10]
            here = timed(lambda rs=some: [draw(r) for r in rs])
            ratios.append(here / timed(lambda rs=some: queued(server, rs)))
    return statistics.median(ratios), statistics.median(differences)


def queued(server: Server, requests: list[dict[str, object]]) -> None:
    """All requests at once, and wait."""
    wait(server, [server.http.post("/v1/jobs", json=r).raise_for_status().json()["id"] for r in requests])


def timed(work: Callable[[], object]) -> float:
    """Seconds of a piece of work."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def wait(server: Server, ids: list[str]) -> list[dict[str, object]]:
    """Wait for the end of jobs."""
    jobs = []
    for id in ids:
        while (job := server.http.get(f"/v1/jobs/{id}").json())["status"] not in ENDED:
            time.sleep(0.02)
        jobs.append(job)
    return jobs


def send(server: Server, request: dict[str, object], kind: str) -> tuple[str, str | None]:
    """One request of a kind: what came of it, and the id of the job if it was accepted."""
    if kind == "wrong":
        answer = server.http.post("/v1/jobs", json={**request, "steps": "many"})
        return f"refused with {answer.status_code}", None
    if kind == "vanishing":
        try:
            body = {"prompt": request["prompt"], "steps": 100}
            server.http.post("/v1/images/generations", json=body, timeout=0.2)
        except httpx.TimeoutException:
            return "left", None
        return "answered before it left", None
    answer = server.http.post("/v1/jobs", json=request)
    if answer.status_code == 429:
        time.sleep(min(2.0, float(answer.headers["retry-after"])))
        return send(server, request, kind)
    id = answer.json()["id"]
    if kind == "cancelled":
        server.http.delete(f"/v1/jobs/{id}")
    return kind, id


def load(server: Server, requests: list[dict[str, object]], seed: int) -> dict[str, object]:
    """Everything at once; a rank is killed in the middle."""
    draw = random.Random(seed)
    kinds = draw.choices(("plain", "cancelled", "wrong", "vanishing"), (85, 5, 5, 5), k=len(requests))
    before = server.memory()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(send, server, *pair) for pair in zip(requests, kinds, strict=True)]
        concurrent.futures.wait(futures[: len(futures) // 2])
        server.kill_a_rank()
        answers = [future.result() for future in futures]
    jobs = wait(server, [id for _, id in answers if id])
    left = [job for job in server.http.get("/v1/jobs", params={"limit": 100}).json()["data"] if job["kind"] == "image"]
    wait(server, [job["id"] for job in left])
    return {
        "requests": dict(collections.Counter(answer for answer, _ in answers)),
        "jobs": dict(collections.Counter(str(job["status"]) for job in jobs)),
        "failed": [job["error"] for job in jobs if job["status"] == "failed"],
        "server MiB before and after": [round(before, 1), round(server.memory(), 1)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int, nargs="?", default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        save_tiny_sd3(folder)
        requests = bodies(arguments.count, arguments.seed)
        server = Server(folder, queue=max(20, arguments.count))
        try:
            ratio, milliseconds = added(server, folder, requests[:50])
            outcome = load(server, requests, arguments.seed)
        finally:
            server.end()
    print(json.dumps({"throughput": round(ratio, 3), "added ms": round(milliseconds, 1), **outcome}, indent=1))


if __name__ == "__main__":
    main()
