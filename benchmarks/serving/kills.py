"""A server that is killed at random moments, again and again: nothing that it accepted may be lost.

``python benchmarks/serving/kills.py 50`` starts a server 50 times and ends it with SIGKILL after up to 12 seconds,
while it loads, draws or stores. Clients send jobs all the time. At last a server is left to finish: every job that was
ever accepted must be done, each with its picture, and no rank of a killed server may be left.
"""

from __future__ import annotations

import argparse
import collections
import random
import tempfile
import threading
import time

import httpx
from server import ENDED, Server

from xdit_core.testing.models import save_tiny_sd3

LONGEST = 12.0  # seconds for which a server lives
GONE = 10.0  # seconds for the ranks of a killed server to end


class Clients:
    """Send a job every few moments, to whichever server there is."""

    def __init__(self) -> None:
        self.accepted: list[str] = []
        self.lost_answers = 0
        self.url = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        draw, number = random.Random(1), 0
        while not self._stop.wait(draw.uniform(0.05, 0.6)):
            if not self.url:
                continue
            number += 1
            body = {"prompt": f"fox {number}", "steps": draw.choice((2, 4, 30)), "seed": number}
            try:
                answer = httpx.post(f"{self.url}/v1/jobs", json=body, timeout=5)
            except httpx.HTTPError:
                self.lost_answers += 1
                continue
            if answer.status_code == 202:
                self.accepted.append(answer.json()["id"])

    def end(self) -> None:
        self._stop.set()
        self._thread.join()


def main() -> None:
    """Kill, and look what is left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int, nargs="?", default=50)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    draw = random.Random(chosen.seed)
    with tempfile.TemporaryDirectory() as folder:
        save_tiny_sd3(folder)
        settings = {"model": "sd3", "model.path": folder, "max_sequence_length": 5, "device": "cpu"}
        clients = Clients()
        for kill in range(chosen.count):
            server = Server(folder, {**settings, "serve.queue": 100_000, "serve.batch": 4})
            clients.url = server.url
            time.sleep(draw.uniform(0, LONGEST))
            server.kill()
            print(f"kill {kill + 1}: {len(clients.accepted)} jobs accepted so far", flush=True)
        clients.url = ""
        clients.end()
        end = time.monotonic() + GONE
        while server.ranks() and time.monotonic() < end:
            time.sleep(0.1)
        left = len(server.ranks())
        server.start()
        with server.client() as http:
            counts: collections.Counter[str] = collections.Counter()
            for id in clients.accepted:
                while (answer := http.get(f"/v1/jobs/{id}")).status_code == 200 and (
                    answer.json()["status"] not in ENDED
                ):
                    time.sleep(0.05)
                job = answer.json() if answer.status_code == 200 else {"status": "lost"}
                whole = job["status"] == "done" and all(
                    len(http.get(result["url"]).content) == result["bytes"] > 0 for result in job["results"]
                )
                counts["done" if whole and len(job["results"]) == 1 else f"not whole: {job}"] += 1
        server.end()
    print(f"{sum(counts.values())} jobs were accepted over {chosen.count} kills: {dict(counts)}")
    print(f"{left} ranks were left; {clients.lost_answers} requests were sent while no server answered")
    if left or set(counts) != {"done"}:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
