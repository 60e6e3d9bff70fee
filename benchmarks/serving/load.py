"""Clients of all kinds against a server, well and badly behaved: every accepted job must end, once.

``python benchmarks/serving/load.py 10000`` sends 10,000 requests of mixed sizes and few steps. One in twenty is
cancelled, one in twenty is wrong, one in twenty is read slowly, and the client of one in twenty closes its socket.
Two ranks and the server are killed in the first part; clients send again, with the same ``Idempotency-Key``, what got
no answer. At last every accepted job must be done, or failed or cancelled with a reason, and none may be listed or
have ended twice. Then the memory of server and ranks over the last 80 % is compared, and `costs.py` measures what
the server costs. What is worse than it should be is printed, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import json
import random
import socket
import statistics
import tempfile
import threading
import time
from typing import Any

import httpx
from costs import PLAN, PROMPTS, costs, shortcomings
from server import ENDED, Server, wait

KINDS = ("plain", "cancelled", "wrong", "slow", "vanishing")
WEIGHTS = (80, 5, 5, 5, 5)
WRONG = (
    *({"steps": "many"}, {"steps": 0}, {"height": 33}, {"width": 10**9}, {"seed": -1}, {"prompt": ""}, {"other": 1}),
    *({"images": 10**6}, {"model": "sd3"}, {"deadline": -1}, {"format": "gif"}, {"prompt": "\0"}),
)
KILLS = ((0.05, "rank"), (0.1, "rank"), (0.15, "server"))  # when, as a part of all requests
STEADY = 0.2  # from which part on memory is compared
MOST_GROWTH = 0.01


class Clients:
    """Sends requests, and remembers what was answered.

    Args:
        server: may be killed and started again meanwhile.
        count: of requests.
    """

    def __init__(self, server: Server, count: int, seed: int) -> None:
        self.server, self.count, self._seed = server, count, seed
        self.accepted: dict[str, str] = {}  # id of each job by the name that its client gave it
        self.answers: collections.Counter[str] = collections.Counter()
        self.sent = 0
        self._lock, self._local = threading.Lock(), threading.local()

    def send(self, number: int) -> None:
        """Send a request, and wait for the end of its job."""
        draw = random.Random(self._seed * 1_000_003 + number)
        kind = draw.choices(KINDS, WEIGHTS)[0]
        size = {"height": draw.choice((32, 48, 64)), "width": draw.choice((32, 48, 64)), "steps": draw.choice((1, 2))}
        body = {"prompt": draw.choice(PROMPTS), **size, "seed": number}
        answer = getattr(self, f"_{kind}")(body, f"request {number}", draw)
        with self._lock:
            self.answers[answer] += 1
            self.sent += 1

    def _ask(self, method: str, path: str, **more: Any) -> httpx.Response:
        """Ask until there is an answer of a server that has room."""
        while True:
            url = self.server.url
            if getattr(self._local, "url", None) != url:
                self._local.url, self._local.http = url, httpx.Client(base_url=url, timeout=600)
            try:
                answer: httpx.Response = self._local.http.request(method, path, **more)
            except httpx.HTTPError:
                self._local.url = None  # there may be another server by now
                time.sleep(0.2)
                continue
            if answer.status_code not in (429, 503):
                return answer
            time.sleep(0.2)

    def _job(self, body: dict[str, Any], name: str) -> str:
        answer = self._ask("POST", "/v1/jobs", json=body, headers={"Idempotency-Key": name})
        id = str(answer.raise_for_status().json()["id"])
        with self._lock:
            self.accepted[name] = id
        return id

    def _ended(self, id: str) -> str:
        while True:
            with contextlib.suppress(httpx.HTTPError):
                return str(wait(self._local.http, id)["status"])
            self._ask("GET", "/health")

    def _plain(self, body: dict[str, Any], name: str, draw: random.Random) -> str:
        id = self._job(body, name)
        status = self._ended(id)
        if status == "done":
            self._ask("GET", f"/v1/jobs/{id}/results/0").raise_for_status()
        return status

    def _cancelled(self, body: dict[str, Any], name: str, draw: random.Random) -> str:
        id = self._job({**body, "steps": 20}, name)
        time.sleep(draw.uniform(0, 0.3))
        self._ask("DELETE", f"/v1/jobs/{id}")
        return f"{self._ended(id)}, after a cancel"

    def _wrong(self, body: dict[str, Any], name: str, draw: random.Random) -> str:
        status = self._ask("POST", "/v1/jobs", json={**body, **draw.choice(WRONG)}).status_code
        return f"wrong, refused with {status}"

    def _slow(self, body: dict[str, Any], name: str, draw: random.Random) -> str:
        """Read events and picture a few bytes at a time."""
        id = self._job({**body, "steps": 6, "previews": 4}, name)
        for path in ("events", "results/0"):
            with contextlib.suppress(OSError), self._raw("GET", f"/v1/jobs/{id}/{path}", b"") as end:
                while end.recv(100):
                    time.sleep(0.002)
        return f"{self._ended(id)}, read slowly"

    def _vanishing(self, body: dict[str, Any], name: str, draw: random.Random) -> str:
        """Close the socket while the job waits or is drawn, or in the middle of the request."""
        data = json.dumps({"prompt": body["prompt"], "steps": 20, "size": "64x64", "user": name}).encode()
        sent = data if draw.random() < 0.8 else data[: len(data) // 2]
        with contextlib.suppress(OSError), self._raw("POST", "/v1/images/generations", sent, len(data)):
            time.sleep(draw.uniform(0, 0.3))
        return "vanished"

    def _raw(self, method: str, path: str, body: bytes, length: int = 0) -> socket.socket:
        """A connection on which a request was written."""
        host, _, port = self.server.url.removeprefix("http://").rpartition(":")
        end = socket.create_connection((host, int(port)), timeout=60)
        about = f"Content-Type: application/json\r\nContent-Length: {length}\r\nConnection: close"
        end.sendall(f"{method} {path} HTTP/1.1\r\nHost: {host}:{port}\r\n{about}\r\n\r\n".encode() + body)
        return end


def disturb(clients: Clients, memory: list[tuple[float, dict[str, float]]]) -> None:
    """Kill at the right moments, and note the memory until all is sent; runs in a thread."""
    kills = list(KILLS)
    while clients.sent < clients.count:
        part = clients.sent / clients.count
        if kills and part >= kills[0][0]:
            if kills.pop(0)[1] == "server":
                clients.server.kill()
                clients.server.start()
            else:
                with contextlib.suppress(IndexError):
                    clients.server.ranks()[0].kill()
        if part >= STEADY:
            memory.append((part, clients.server.memory()))
        time.sleep(0.5)


def growth(memory: list[tuple[float, dict[str, float]]], name: str) -> float:
    """How much memory has grown from the first tenth of the time compared to the last, as a part."""
    first = [sizes[name] for part, sizes in memory if part < STEADY + 0.1]
    last = [sizes[name] for part, sizes in memory if part >= 0.9]
    return statistics.median(last) / statistics.median(first) - 1 if first and last else 0.0


def audit(server: Server, accepted: dict[str, str]) -> tuple[dict[str, int], list[str]]:
    """Look at every job that the server knows.

    Returns:
        How many ended how, and what is wrong.
    """
    jobs: list[dict[str, Any]] = []
    with server.client() as http:
        more = {}
        while True:
            page = http.get("/v1/jobs", params={"limit": 100, **more}).raise_for_status().json()
            jobs += page["data"]
            if not page["has_more"]:
                break
            more = {"after": page["data"][-1]["id"]}
        waited = [job["id"] for job in jobs if job["status"] not in ENDED]
        by_id = {job["id"]: job for job in jobs} | {id: wait(http, id) for id in waited}
    ends = collections.Counter(line["job"] for line in server.log() if line["event"] == "job ended")
    wrong = []
    if len(by_id) < len(jobs):
        wrong.append(f"{len(jobs) - len(by_id)} jobs are listed twice")
    if lost := [id for id in accepted.values() if id not in by_id]:
        wrong.append(f"{len(lost)} accepted jobs are gone, such as {lost[0]}")
    if len(set(accepted.values())) < len(accepted):
        wrong.append("two requests were given the same job")
    seeds = collections.Counter(job["settings"]["seed"] for job in jobs if job["kind"] == "job")
    if double := [seed for seed, times in seeds.items() if times > 1]:
        wrong.append(f"{len(double)} requests have two jobs, such as the one with seed {double[0]}")
    if again := [id for id, times in ends.items() if times > 1]:
        wrong.append(f"{len(again)} jobs have ended twice, such as {again[0]}")
    if mute := [id for id, job in by_id.items() if job["status"] != "done" and not job["error"]]:
        wrong.append(f"{len(mute)} jobs have ended without a reason, such as {mute[0]}")
    for line in server.log():
        if "traceback" in line:
            wrong.append(f"the log has a traceback: {line['event']}: {line['error']}")
    return dict(collections.Counter(job["status"] for job in by_id.values())), wrong


def load(folder: str, count: int, clients: int, seed: int) -> tuple[dict[str, Any], list[str]]:
    """Everything at once.

    Returns:
        What happened, and what is wrong.
    """
    server = Server(folder, {**PLAN, "serve.queue": 4 * clients}).ready()
    sender, memory = Clients(server, count, seed), list[tuple[float, dict[str, float]]]()
    watcher = threading.Thread(target=disturb, args=(sender, memory))
    watcher.start()
    begun = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        for done in [pool.submit(sender.send, number) for number in range(count)]:
            done.result()
    watcher.join()
    minutes = (time.monotonic() - begun) / 60
    statuses, wrong = audit(server, sender.accepted)
    server.end()
    if server.ranks():
        wrong.append("ranks are left")
    grown = {name: growth(memory, name) for name in ("server", "ranks")}
    wrong += [f"the memory of the {name} has grown" for name, part in grown.items() if part >= MOST_GROWTH]
    outcome = {
        "minutes": round(minutes, 1),
        "answers": dict(sender.answers.most_common()),
        "jobs": statuses,
        "memory": {
            name: f"{memory[-1][1][name]:.0f} MiB, {100 * part:+.2f} %" for name, part in grown.items() if memory
        },
    }
    return outcome, wrong


def main() -> None:
    """Send, look, measure, and fail if something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int, nargs="?", default=2000)
    parser.add_argument("--clients", type=int, default=12, help="how many send at the same time")
    parser.add_argument("--rounds", type=int, default=7, help="of the comparison with a gang; 0 leaves it out")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        outcome, wrong = load(folder, chosen.count, chosen.clients, chosen.seed)
        print(json.dumps(outcome, indent=1), flush=True)
        if chosen.rounds:
            measured = costs(f"{folder}/costs", 50, chosen.rounds, chosen.seed)
            print(json.dumps({name: round(value, 3) for name, value in measured.items()}, indent=1))
            wrong += shortcomings(measured)
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
