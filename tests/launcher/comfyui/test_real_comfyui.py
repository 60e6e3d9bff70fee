"""The nodes in a real ComfyUI, through its API. Needs its source in ``COMFYUI_PATH``, and a Python that has what it
needs in ``COMFYUI_PYTHON``, by default this one."""

from __future__ import annotations

import io
import json
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.launcher.comfy import NODES, ComfyUI, Messages
from helpers.launcher.served import Served, wait_for
from helpers.models.tiny import saved

if "COMFYUI_PATH" not in os.environ:
    pytest.skip("COMFYUI_PATH does not say where ComfyUI is", allow_module_level=True)
for name in ("fastapi", "httpx", "websockets"):
    pytest.importorskip(name)


@pytest.fixture(scope="module")
def comfy(tmp_path_factory):
    running = ComfyUI(
        Path(os.environ["COMFYUI_PATH"]),
        tmp_path_factory.mktemp("comfyui"),
        os.environ.get("COMFYUI_PYTHON", sys.executable),
    )
    yield running
    running.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory, tiny_sd3_folder):
    words = ("model=sd3", f"model.path={tiny_sd3_folder}", "steps=6", "max_sequence_length=5", "device=cpu")
    served = Served(tmp_path_factory.mktemp("serve") / "server", *words, "serve.steps=5000").ready()
    yield served
    served.close()


@pytest.fixture
def messages(comfy):
    found = Messages(comfy)
    yield found
    found.close()


def graph(kind, server, **inputs):
    """A workflow with a node of ours whose pictures are saved."""
    given = {"prompt": "a red fox", "negative": "", "seed": 0, "steps": 0, "guidance": -1.0, "width": 0, "height": 0}
    ours = {"class_type": kind, "inputs": {"server": server.url, **given, **inputs}}
    return {"1": ours, "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "test"}}}


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def test_comfyui_has_the_nodes_of_the_example_workflows(comfy):
    known = comfy.http.get("/object_info").json()
    assert known["XditGenerate"]["display_name"] == "xdit Generate (server)"
    for path in (NODES / "example_workflows").glob("*.json"):
        assert {node["type"] for node in json.loads(path.read_text())["nodes"]} <= set(known)


def test_the_pictures_are_those_of_the_server(comfy, server, messages):
    ended = comfy.ended(comfy.queue(graph("XditGenerate", server, images=2, seed=7, previews=2)))
    assert ended["status"]["status_str"] == "success", ended["status"]
    shown = [pixels(comfy.picture(output)) for output in ended["outputs"]["2"]["images"]]
    with server.http() as http:
        job = http.get("/v1/jobs").json()["data"][0]
        drawn = [pixels(http.get(result["url"]).content) for result in job["results"]]
    assert len(shown) == 2 and all(np.array_equal(a, b) for a, b in zip(shown, drawn, strict=True))
    assert job["settings"]["seed"] == 7
    wait_for(lambda: messages.of("execution_success"))
    progress = [(data["value"], data["max"]) for data in messages.of("progress")]
    assert progress == sorted(progress) and progress[-1] == (6, 6)
    assert len(messages.pictures) >= 2


def test_interrupt_ends_the_job_on_the_server(comfy, server, messages):
    id = comfy.queue(graph("XditGenerate", server, images=1, steps=5000, seed=1))
    wait_for(lambda: messages.of("progress"), comfy.log)
    comfy.http.post("/interrupt")
    assert [name for name, _ in comfy.ended(id)["status"]["messages"]][-1] == "execution_interrupted"
    with server.http() as http:
        job = wait_for(lambda: http.get("/v1/jobs", params={"status": "cancelled"}).json()["data"])[0]
    assert job["settings"]["steps"] == 5000


def error_of(ended):
    """What the user reads below the node."""
    (error,) = [data for name, data in ended["status"]["messages"] if name == "execution_error"]
    assert error["node_id"] == "1"
    return error["exception_message"]


def test_the_user_reads_what_the_server_says(comfy, server):
    ended = comfy.ended(comfy.queue(graph("XditGenerate", server, images=1, steps=9000)))
    assert error_of(ended).startswith("steps=9000 is more than this server allows")
    work = graph("XditEdit", server, images=1, image=["3", 0])
    work["3"] = {"class_type": "EmptyImage", "inputs": {"width": 32, "height": 32, "batch_size": 1, "color": 255}}
    assert "draws from text only and takes no picture" in error_of(comfy.ended(comfy.queue(work)))


def test_videos(comfy, tmp_path):
    words = ("height=32", "width=48", "frames=5", "steps=3", "max_sequence_length=7", "device=cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = saved("wan", tmp_path / "wan")
    served = Served(tmp_path / "server", "model=wan", f"model.path={path}", *words).ready()
    try:
        work = graph("XditVideo", served, frames=9)
        work["3"] = {"class_type": "CreateVideo", "inputs": {"images": ["1", 0], "fps": ["1", 1]}}
        work["4"] = {
            "class_type": "SaveVideo",
            "inputs": {"video": ["3", 0], "filename_prefix": "test", "format": "mp4", "codec": "h264"},
        }
        ended = comfy.ended(comfy.queue(work))
        assert ended["status"]["status_str"] == "success", ended["status"]
        assert len(ended["outputs"]["2"]["images"]) == 9 and set(ended["outputs"]) == {"2", "4"}
    finally:
        served.close()
