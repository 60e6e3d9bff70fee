"""What ends in the middle costs nobody a job: ranks, and the server itself."""

from __future__ import annotations

import signal

import psutil
import pytest

from helpers.launcher.served import KEYS, Served, ended, wait_for


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "keys").write_text(f"# keys of the tests\n{KEYS[0]}\n")
    return tmp_path


def ranks_of(served: Served) -> list[psutil.Process]:
    below = psutil.Process(served.process.pid).children(recursive=True)
    return [process for process in below if "xdit_core.worker" in " ".join(process.cmdline())]


def step_of(client, id: str) -> int:
    job = client.get(f"/v1/jobs/{id}").json()
    return (job["progress"] or {}).get("step") or 0


def test_ranks_die_the_server_dies_and_every_job_ends(folder, words):
    words = (*words, "--plugins", "usp", "usp.ulysses=2", "serve.steps=2000", "--keys", str(folder / "keys"))
    served = Served(folder / "work", *words, key=KEYS[0]).ready()
    try:
        with served.http() as client:
            assert len(ranks_of(served)) == 2
            body = {"prompt": "a red fox", "steps": 150, "seed": 5}
            id = client.post("/v1/jobs", json=body).json()["id"]
            wait_for(lambda: step_of(client, id) > 1, served.log)
            ranks_of(served)[1].kill()
            first = ended(client, id)
            assert first["status"] == "done", served.log()
            assert served.events("job waits again") and served.events("the ranks have ended")
            picture = client.get(first["results"][0]["url"]).content

            running = client.post("/v1/jobs", json=body).json()["id"]
            queued = [client.post("/v1/jobs", json={"prompt": f"number {i}"}).json()["id"] for i in range(3)]
            wait_for(lambda: step_of(client, running) > 1, served.log)
        served.end(signal.SIGKILL)

        served = Served(folder / "work", *words, key=KEYS[0])
        with served.http() as client:
            assert client.get(first["results"][0]["url"]).content == picture  # before the ranks are there
            jobs = [ended(client, id) for id in (running, *queued)]
            assert [job["status"] for job in jobs] == ["done"] * 4, served.log()
            assert client.get(jobs[0]["results"][0]["url"]).content == picture
            check_keys(served, folder / "keys")
        assert drained(served) == 0
    finally:
        served.close()


def test_a_server_whose_ranks_are_loading_ends_at_once(tmp_path, words):
    served = Served(tmp_path / "work", *words)
    with served.http() as client:
        assert client.get("/health").status_code == 200 and client.get("/ready").status_code == 503
        assert client.post("/v1/jobs", json={"prompt": "a red fox"}).json()["position"] == 1
    ranks = wait_for(lambda: ranks_of(served))
    assert served.end() == 0
    assert served.events("the server has ended")[-1]["waiting"] == 1
    assert served.events("the ranks were ended while they loaded")
    wait_for(lambda: not any(rank.is_running() and rank.status() != "zombie" for rank in ranks))


def check_keys(served: Served, file) -> None:
    """A key opens its own jobs only; a signal lets the server read the keys again."""
    openai = pytest.importorskip("openai")
    for key in ("none", KEYS[1]):
        with served.openai(key) as client, pytest.raises(openai.AuthenticationError, match="key"):
            client.models.list()
    with served.http() as first:
        del first.headers["authorization"]
        assert first.get("/v1/jobs").status_code == 401 == first.get("/metrics").status_code
        assert first.get("/health").status_code == 200
    file.write_text("\n".join(KEYS))
    served.process.send_signal(signal.SIGHUP)
    wait_for(lambda: served.events("keys were read again"), served.log)
    with served.http() as first, served.http(KEYS[1]) as second:
        id = first.get("/v1/jobs").json()["data"][0]["id"]
        assert second.get("/v1/jobs").json()["data"] == []
        for answer in (second.get(f"/v1/jobs/{id}"), second.delete(f"/v1/jobs/{id}")):
            assert answer.status_code == 404
        assert second.get(f"/v1/jobs/{id}/results/0").status_code == 404
        assert second.get(f"/v1/jobs/{id}/results/0", params={"token": "0" * 32}).status_code == 404
    assert not any(key in served.log() for key in KEYS)


def drained(served: Served) -> int:
    """End a server while it draws: the running job is finished, and those that wait stay in the store."""
    with served.http() as client:
        running = client.post("/v1/jobs", json={"prompt": "a red fox", "steps": 150}).json()["id"]
        waits = client.post("/v1/jobs", json={"prompt": "a red fox"}).json()["id"]
        wait_for(lambda: step_of(client, running) > 1, served.log)
        served.process.send_signal(signal.SIGTERM)
        wait_for(lambda: client.get("/ready").status_code == 503)
        assert client.post("/v1/jobs", json={"prompt": "a red fox"}).status_code == 503
    code = served.process.wait(60)
    ends = {line["job"]: line["status"] for line in served.events("job ended")}
    assert ends[running] == "done" and waits not in ends
    assert served.events("the server has ended")[-1]["waiting"] == 1
    return code
