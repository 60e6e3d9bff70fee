"""Our own API: jobs, their place in the queue, their events and results."""

from __future__ import annotations

import base64
import io
import json

import pytest
from PIL import Image

from helpers.launcher.served import Served, ended, wait_for


def stream(client, id):
    """The events of a job, as pairs of name and data."""
    with client.stream("GET", f"/v1/jobs/{id}/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line and not line.startswith(":")]
    return [
        (name.removeprefix("event: "), json.loads(data.removeprefix("data: ")))
        for name, data in zip(lines[::2], lines[1::2], strict=True)
    ]


@pytest.fixture
def busy(http):
    """A job that keeps the ranks at work until the test ends."""
    id = http.post("/v1/jobs", json={"prompt": "a long one", "steps": 2000}).json()["id"]
    wait_for(lambda: http.get(f"/v1/jobs/{id}").json()["status"] == "running")
    yield id
    http.delete(f"/v1/jobs/{id}")
    assert ended(http, id)["status"] == "cancelled"


def test_a_job_from_start_to_end(http):
    body = {"prompt": "a red fox", "steps": 4, "seed": 3, "negative": "blue", "guidance": 4.5, "images": 2}
    answer = http.post("/v1/jobs", json={**body, "height": 32, "width": 16, "format": "webp"})
    job = answer.json()
    assert answer.status_code == 202 and answer.headers["location"] == f"/v1/jobs/{job['id']}"
    done = ended(http, job["id"])
    assert done["status"] == "done" and done["error"] is None and done["position"] is None
    assert done["created"] <= done["started"] <= done["ended"]
    assert {"encode", "denoise", "decode"} <= set(done["seconds"])
    assert done["settings"]["steps"] == 4 and done["settings"]["guidance"] == 4.5
    assert [(item["seed"], item["media_type"]) for item in done["results"]] == [(3, "image/webp"), (4, "image/webp")]
    data = http.get(done["results"][1]["url"]).content
    assert len(data) == done["results"][1]["bytes"]
    assert Image.open(io.BytesIO(data)).size == (16, 32)
    assert http.get(f"/v1/jobs/{job['id']}/results/2").status_code == 404
    assert http.delete(f"/v1/jobs/{job['id']}").json()["status"] == "done"
    assert http.delete(f"/v1/jobs/{job['id']}", params={"purge": True}).json()["deleted"]
    assert http.get(f"/v1/jobs/{job['id']}").status_code == 404


def test_a_picture_for_each_seed(http):
    id = http.post("/v1/jobs", json={"prompt": "a red fox", "seed": [9, 4, 6]}).json()["id"]
    assert [item["seed"] for item in ended(http, id)["results"]] == [9, 4, 6]


def test_latents(http):
    from safetensors.numpy import load

    id = http.post("/v1/jobs", json={"prompt": "a red fox", "output_type": "latent"}).json()["id"]
    result = ended(http, id)["results"][0]
    assert load(http.get(result["url"]).content)["latents"].shape[0] == 1


def test_events_of_a_job_that_waits_and_runs(http, busy):
    id = http.post("/v1/jobs", json={"prompt": "a red fox", "steps": 6, "previews": 2}).json()["id"]
    waiting = http.get(f"/v1/jobs/{id}").json()
    assert (waiting["status"], waiting["position"]) == ("queued", 1)
    http.delete(f"/v1/jobs/{busy}")
    events = stream(http, id)
    names = [name for name, _ in events]
    assert names[-1] == "done" and events[-1][1]["results"]
    assert [data["step"] for name, data in events if name == "step"] == [1, 2, 3, 4, 5, 6]
    previews = [data for name, data in events if name == "preview"]
    assert [(data["step"], data["steps"]) for data in previews] == [(2, 6), (4, 6)]
    assert Image.open(io.BytesIO(base64.b64decode(previews[0]["b64_png"]))).format == "PNG"
    assert [name for name, _ in stream(http, id)] == ["done"]  # whoever comes late is told the end


def test_the_queue_is_bounded_ordered_and_can_be_left(http, busy):
    ids = [http.post("/v1/jobs", json={"prompt": f"number {i}", "priority": i}).json()["id"] for i in range(3)]
    assert [http.get(f"/v1/jobs/{id}").json()["position"] for id in ids] == [3, 2, 1]
    full = http.post("/v1/jobs", json={"prompt": "one too many"})
    assert full.status_code == 429 and int(full.headers["retry-after"]) >= 1
    assert full.json()["error"]["code"] == "queue_full" and "3 jobs wait already" in full.json()["error"]["message"]
    assert http.delete(f"/v1/jobs/{ids[2]}").json()["status"] == "cancelled"
    assert [http.get(f"/v1/jobs/{id}").json()["position"] for id in ids[:2]] == [2, 1]
    http.delete(f"/v1/jobs/{busy}")
    done = [ended(http, id) for id in ids[:2]]
    assert [job["status"] for job in done] == ["done", "done"] and done[1]["started"] < done[0]["started"]
    assert done[0]["estimate"] is None


def test_a_running_job_is_cancelled_and_the_next_is_drawn(http, busy):
    job = wait_for(lambda: (http.get(f"/v1/jobs/{busy}").json()["progress"] or {}).get("step"))
    assert job >= 1
    http.delete(f"/v1/jobs/{busy}")
    cancelled = ended(http, busy)
    assert cancelled["status"] == "cancelled" and "client" in cancelled["error"]["message"]
    id = http.post("/v1/jobs", json={"prompt": "a red fox"}).json()["id"]
    assert ended(http, id)["status"] == "done"


def test_deadlines(http, busy):
    waits = http.post("/v1/jobs", json={"prompt": "a red fox", "deadline": 0.5}).json()["id"]
    job = ended(http, waits)
    assert job["status"] == "failed" and "deadline passed while the job waited" in job["error"]["message"]
    http.delete(f"/v1/jobs/{busy}")
    runs = http.post("/v1/jobs", json={"prompt": "a red fox", "deadline": 1.5, "steps": 2000}).json()["id"]
    job = ended(http, runs)
    assert job["status"] == "failed" and "deadline passed while the job was drawn" in job["error"]["message"]


def test_an_idempotency_key_makes_one_job(http):
    name, body = {"Idempotency-Key": "order 1"}, {"prompt": "a red fox"}
    first, second = (http.post("/v1/jobs", json=body, headers=name) for _ in range(2))
    assert (first.status_code, second.status_code) == (202, 200) and first.json()["id"] == second.json()["id"]
    other = http.post("/v1/jobs", json={"prompt": "a blue fox"}, headers=name)
    assert other.status_code == 409 and other.json()["error"]["code"] == "idempotency_key_reused"


def test_the_list_has_pages(http):
    ids = [ended(http, http.post("/v1/jobs", json={"prompt": f"page {i}"}).json()["id"])["id"] for i in range(3)]
    first = http.get("/v1/jobs", params={"limit": 2}).json()
    assert [job["id"] for job in first["data"]] == ids[:0:-1] and first["has_more"]
    rest = http.get("/v1/jobs", params={"limit": 2, "after": ids[1]}).json()
    assert rest["data"][0]["id"] == ids[0]
    assert all(job["status"] == "done" for job in http.get("/v1/jobs", params={"status": "done"}).json()["data"])


BODIES = {
    "nothing": b"",
    "half": b"{",
    "list": b"[]",
    "deep": b"[" * 100_000,
    "no prompt": b"{}",
    "half a character": b'{"prompt": "\\ud800"}',
    "half a character as a name": b'{"prompt": "x", "\\ud800": 1}',
    "bytes": b"\xff\xfe",
    "long number": b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}",
    "large number": b'{"prompt": "x", "images": 99999999999999999999999}',
    "not a number": b'{"prompt": "x", "guidance": NaN}',
    "a number too large": b'{"prompt": "x", "guidance": 1' + b"0" * 400 + b"}",
    "no number in an argument": b'{"prompt": "x", "call": {"mu": Infinity}}',
    "no seed": b'{"prompt": "x", "seed": []}',
    "yes for a number": b'{"prompt": "x", "steps": true}',
    "another type": b'{"prompt": ["x"]}',
    "an argument": b'{"prompt": "x", "call": {"generator": 1}}',
    "a path": b'{"prompt": "x", "model": "../../etc/passwd"}',
    "unknown": b'{"prompt": "x", "lora": "http://example.com/x"}',
    "too large": b'{"prompt": "' + b"x" * 2_000_000 + b'"}',
}


@pytest.mark.parametrize("name", BODIES)
def test_a_wrong_body_gets_a_sentence(http, name):
    answer = http.post("/v1/jobs", content=BODIES[name], headers={"Content-Type": "application/json"})
    assert 400 <= answer.status_code < 500
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"].endswith(".")
    assert "Traceback" not in answer.text


@pytest.mark.parametrize("kind", ["multipart/form-data", "multipart/form-data; boundary=x", "text/plain", "a/b"])
def test_a_wrong_form_gets_a_sentence(http, kind):
    for path in ("/v1/images/edits", "/v1/images/generations", "/v1/jobs"):
        answer = http.post(path, content=b"--x\r\nhalf", headers={"Content-Type": kind})
        assert 400 <= answer.status_code < 500 and answer.json()["error"]["message"].endswith(".")


def test_what_does_not_exist(http):
    for method, path in (("GET", "/v1/nothing"), ("PUT", "/v1/jobs"), ("GET", "/v1/jobs/..%2f..%2fetc")):
        answer = http.request(method, path)
        assert answer.status_code in (404, 405) and answer.json()["error"]["message"].endswith(".")


def test_pages_of_other_sites_are_kept_out(http):
    for headers in ({"Origin": "http://example.com"}, {"Origin": "null"}, {"Host": "example.com"}, {"Host": "[::1"}):
        answer = http.post("/v1/jobs", json={"prompt": "a red fox"}, headers=headers)
        assert answer.status_code in (400, 403) and answer.json()["error"]["message"].endswith(".")
    assert "access-control-allow-origin" not in http.get("/v1/models").headers


def test_what_operators_ask_for(server: Served, http):
    assert http.get("/health").json()["status"] == "ok" and http.get("/ready").json()["ready"]
    prompt = 'a "fox"\n\x1b[31m in red'
    ended(http, http.post("/v1/jobs", json={"prompt": prompt}).json()["id"])
    lines = http.get("/metrics").text.splitlines()
    values = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}
    assert values['xdit_jobs_total{outcome="done"}'] >= 1 and values["xdit_ready"] == 1
    assert values['xdit_jobs_begun_total{together="1"}'] >= 1 and values["xdit_peak_bytes"] > 2**20
    assert values["xdit_steps_total"] >= 3 and values['xdit_job_seconds_count{phase="denoise"}'] >= 1
    assert values['xdit_http_requests_total{method="POST",route="/v1/jobs",status="202"}'] >= 1
    logged = [line["prompt"] for line in server.events("job accepted")]
    assert 'a "fox"\n\\x1b[31m in red' in logged and "\x1b" not in server.log()
