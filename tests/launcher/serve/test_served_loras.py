"""LoRAs of a service: clients name those of its list, whose files are read again at a signal."""

from __future__ import annotations

import json
import signal
import time
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("fastapi")

from helpers.launcher.served import Served, ended, wait_for
from xdit_core.planning.planner import make_plan
from xdit_launcher.gang.loras import AllowedLoras
from xdit_launcher.serve.api.common import Server
from xdit_launcher.serve.auth import Keys
from xdit_launcher.serve.limits import ApiError, RequestCheck, ServeSettings
from xdit_launcher.serve.webhooks.addresses import Webhooks

PROMPT = {"prompt": "a red fox", "seed": 5}


def drawn(http: Any, **more: Any) -> tuple[dict[str, Any], bytes]:
    """The settings and the picture of a job."""
    job = ended(http, http.post("/v1/jobs", json={**PROMPT, **more}).json()["id"])
    assert job["status"] == "done", job
    return job["settings"], http.get(job["results"][0]["url"]).content


def test_a_job_with_loras(http, server: Served):
    settings, plain = drawn(http)
    assert "lora" not in settings
    settings, ink = drawn(http, lora={"ink": 3, "wash": 0})
    assert settings["lora"] == {"ink": 3.0} and ink != plain
    assert drawn(http, lora="ink:3")[1] == ink and drawn(http, lora={})[1] == plain
    shown = {setting["name"] for setting in http.get("/v1/settings").json()["settings"]}
    assert {"lora.ink", "lora.wash"} <= shown
    fields = http.get("/openapi.json").json()["components"]["schemas"]
    assert all("anyOf" in fields[name]["properties"]["lora"] for name in ("JobRequest", "ImageRequest"))
    client = pytest.importorskip("openai").OpenAI(base_url=f"{server.url}/v1", api_key="none")
    with client:
        answer = client.images.generate(**{"prompt": "a red fox"}, extra_body={"seed": 5, "lora": {"ink": 3}})
    job = http.get(f"/v1/jobs/{answer.job}").json()
    assert job["settings"]["lora"] == {"ink": 3.0} and http.get(job["results"][0]["url"]).content == ink


@pytest.mark.parametrize(
    ("lora", "says"),
    [
        ('"/etc/passwd"', "there is no LoRA '/etc/passwd'; known are ink, wash."),
        ('"http://example.com/ink.safetensors"', "there is no LoRA 'http'; known are ink, wash."),
        ('{"\\ud800\\n": 1}', "there is no LoRA '\\ud800\\n'; known are ink, wash."),
        ('{"ink": NaN}', "ink has the scale nan"),
        ('{"ink": 1e9}', "ink has the scale 1000000000.0; give a number from -100 to 100."),
        ('{"ink": true}', "ink has the scale True"),
        ('{"ink": ' + "[" * 300 + "]" * 300 + "}", "ink has the scale a list"),
        ('["ink"]', 'write {"NAME": 0.8}, or "NAME:0.8,OTHER".'),
        ("false", "lora has names with scales"),
        ('"ink,ink:2"', "ink is given twice"),
    ],
)
def test_what_is_refused(http, lora, says):
    head = {"Content-Type": "application/json"}
    for path in ("/v1/jobs", "/v1/images/generations"):
        answer = http.post(path, content=f'{{"prompt": "x", "lora": {lora}}}', headers=head)
        error = answer.json()["error"]
        assert answer.status_code == 400 and error["param"] == "lora" and says in error["message"], answer.text


def test_videos_name_loras_too():
    from xdit_launcher.serve.api.videos import VideoRequest

    assert VideoRequest(prompt="x", lora="ink:0.5").lora == "ink:0.5"  # type: ignore[call-arg]
    assert VideoRequest.model_validate_json(json.dumps({"prompt": "x", "lora": {"ink": 1}})).lora == {"ink": 1}


def test_a_signal_lets_the_server_read_its_list_again(http, server: Served):
    file = server.folder.parent / "loras.txt"
    before = file.read_text()
    try:
        blocking = http.post("/v1/jobs", json={**PROMPT, "steps": 1000}).json()["id"]
        waits = http.post("/v1/jobs", json={**PROMPT, "lora": "wash"}).json()["id"]
        file.write_text(before.replace("wash =", "paint ="))
        server.process.send_signal(signal.SIGHUP)
        wait_for(lambda: server.events("LoRAs were read again"), server.log)
        assert server.events("LoRAs were read again")[-1]["count"] == 2 and server.events("keys were read again")
        answer = http.post("/v1/jobs", json={**PROMPT, "lora": "wash"}).json()["error"]["message"]
        assert "there is no LoRA 'wash'; known are ink, paint." in answer
        http.delete(f"/v1/jobs/{blocking}")
        job = ended(http, waits)
        assert job["status"] == "failed" and "there is no LoRA 'wash'; known are" in job["error"]["message"]
        assert drawn(http, lora="paint")[1] != drawn(http)[1]
        file.write_text("ink = nowhere")
        server.process.send_signal(signal.SIGHUP)
        wait_for(lambda: server.events("LoRAs could not be read again; those of before are used"), server.log)
        drawn(http, lora="paint")
    finally:
        file.write_text(before)
        server.process.send_signal(signal.SIGHUP)
        wait_for(lambda: len(server.events("LoRAs were read again")) > 1, server.log)


def test_a_server_without_loras(words):
    plan = make_plan([], dict(word.split("=", 1) for word in words))
    check = RequestCheck(plan, ServeSettings())
    assert "lora" not in check.check("x", {"lora": None}).settings
    with pytest.raises(ApiError, match="none is allowed here; leave lora out") as caught:
        check.check("x", {"lora": {"ink": 1}})
    assert caught.value.param == "lora"
    log: list[Any] = []
    desk = SimpleNamespace(log=SimpleNamespace(write=lambda *what, **more: log.append((what, more))))
    check = RequestCheck(plan, ServeSettings(), AllowedLoras())
    Server(desk, check, Keys(None, {}), b"", time.time(), Webhooks()).reload()  # type: ignore[arg-type]
    assert log == [(("keys were read again",), {"count": 0}), (("LoRAs were read again",), {"count": 0})]
