"""A trace of a job, where the server records any."""

from __future__ import annotations

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx")

import httpx

from helpers.launcher.answering import answering
from helpers.launcher.fake_gangs import until


def status(url, id):
    return httpx.get(f"{url}/v1/jobs/{id}").json()["status"]


def test_a_job_that_asks_for_it_has_a_trace(tmp_path):
    with answering(tmp_path, trace=True) as (url, gangs):
        asks, other = (
            httpx.post(f"{url}/v1/jobs", json={"prompt": "x", **more}).json()["id"] for more in ({"trace": True}, {})
        )
        until(lambda: {status(url, id) for id in (asks, other)} == {"done"})
        answer = httpx.get(f"{url}/v1/jobs/{asks}/trace")
        assert answer.json()["traceEvents"][0]["args"]["name"] == "rank 0 on a machine"
        assert answer.headers["content-type"] == "application/json"
        assert len(httpx.get(f"{url}/v1/jobs/{asks}").json()["results"]) == 1
        missing = httpx.get(f"{url}/v1/jobs/{other}/trace")
        assert missing.status_code == 404 and "trace=true" in missing.json()["error"]["message"]
    assert [request.get("trace") for request in gangs.gangs[0].requests] == [True, None]


def test_a_server_that_records_none_says_so(tmp_path):
    with answering(tmp_path) as (url, _):
        answer = httpx.post(f"{url}/v1/jobs", json={"prompt": "x", "trace": True})
    assert answer.status_code == 400 and "trace=yes" in answer.json()["error"]["message"]
