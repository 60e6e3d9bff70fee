"""The nodes in a real ComfyUI, through its API. Needs its source in ``COMFYUI_PATH``, and a Python that has what it
needs in ``COMFYUI_PYTHON``, by default this one."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file

from helpers.comfyui import real_comfyui
from helpers.comfyui.real_comfyui import NODES, ComfyUI, Messages
from helpers.launcher.served import Served, wait_for
from helpers.models.tiny import saved

if "COMFYUI_PATH" not in os.environ:
    pytest.skip("COMFYUI_PATH does not say where ComfyUI is", allow_module_level=True)
for name in ("fastapi", "httpx", "websockets"):
    pytest.importorskip(name)


SOURCE = Path(os.environ["COMFYUI_PATH"]).resolve()
HELPERS = Path(real_comfyui.__file__).parent
PYTHON = os.environ.get("COMFYUI_PYTHON", sys.executable)
ROOT = NODES.parents[1]
OURS = os.pathsep.join(map(str, (ROOT, *(ROOT / name for name in ("launcher", "models", "plugins")))))
CONDITIONING = """
import torch

class Conditioning:
    \"\"\"Random conditioning, since tiny models have no text encoder that ComfyUI knows.\"\"\"

    RETURN_TYPES, FUNCTION, CATEGORY = ("CONDITIONING",), "run", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {name: ("INT", {"default": 1}) for name in ("seed", "tokens", "width", "pooled")}}

    def run(self, seed, tokens, width, pooled):
        make = torch.Generator().manual_seed(seed)
        text, whole = torch.randn(1, tokens, width, generator=make), torch.randn(1, pooled, generator=make)
        return ([[text, {"pooled_output": whole}]],)

NODE_CLASS_MAPPINGS = {"TestConditioning": Conditioning}
"""


@pytest.fixture(scope="module")
def comfy(tmp_path_factory):
    running = ComfyUI(SOURCE, tmp_path_factory.mktemp("comfyui"), PYTHON, CONDITIONING, PYTHONPATH=OURS)
    yield running
    running.close()


@pytest.fixture(scope="module")
def with_xdit():
    """ComfyUI's Python has xdit."""
    command, env = [PYTHON, "-c", "import xdit_launcher.gang.gang, diffusers"], {**os.environ, "PYTHONPATH": OURS}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"COMFYUI_PYTHON does not have xdit: {done.stderr.splitlines()[-1]}")


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


def test_arguments_of_denoisers_are_those_of_comfyui(with_xdit):
    """ComfyUI's denoisers, and those of diffusers with our arguments, predict the same with the same weights."""
    path = os.pathsep.join([str(SOURCE), OURS])
    command = [PYTHON, str(HELPERS / "comfy_denoisers.py"), "--cpu"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for family, (difference, largest) in json.loads(done.stdout.splitlines()[-1]).items():
        assert difference <= 1e-5 * largest, family


SIZES = {"flux": ("EmptySD3LatentImage", {}), "wan": ("EmptyHunyuanLatentVideo", {"length": 5})}


def sampled(comfy, family, folder, plugins, settings, lora=""):
    """A workflow with our model and ComfyUI's sampler, and its latents."""
    config = json.loads((Path(folder) / "transformer" / "config.json").read_text())
    text = {"tokens": 7, "width": config.get("joint_attention_dim") or config["text_dim"]}
    text["pooled"] = config.get("pooled_projection_dim", 1)
    kind, more = SIZES[family]
    settings = f"{settings} device=cpu threads=1 height=32 width=48 max_sequence_length=7"
    load = {"family": family, "path": str(folder), "plugins": plugins, "settings": settings}
    sampler = {"seed": 3, "steps": 3, "cfg": 2.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    nodes = {
        "1": ("XditLoadModel", load),
        "2": ("TestConditioning", {"seed": 1, **text}),
        "3": ("TestConditioning", {"seed": 2, **text}),
        "4": (kind, {"width": 48, "height": 32, "batch_size": 1, **more}),
        "5": ("KSampler", {"positive": ["2", 0], "negative": ["3", 0], "latent_image": ["4", 0], **sampler}),
        "6": ("SaveLatent", {"samples": ["5", 0], "filename_prefix": "test"}),
    }
    nodes["5"][1]["model"] = ["1", 0]
    if lora:
        nodes["7"] = ("LoraLoaderModelOnly", {"model": ["1", 0], "lora_name": lora, "strength_model": 1.0})
        nodes["5"][1]["model"] = ["7", 0]
    ended = comfy.ended(comfy.queue({id: {"class_type": kind, "inputs": given} for id, (kind, given) in nodes.items()}))
    if ended["status"]["status_str"] != "success":
        (error,) = [data for name, data in ended["status"]["messages"] if name == "execution_error"]
        return error["exception_message"]
    output = ended["outputs"]["6"]["latents"][0]
    return load_file(comfy.folder / "output" / output["filename"])["latent_tensor"]


def checkpoint(family, folder):
    """A tiny pipeline, whose denoiser takes the 16 channels that ComfyUI gives it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saved(family, folder)
    config = json.loads((folder / "transformer" / "config.json").read_text())
    changes = {"in_channels": 64, "out_channels": None} if family == "flux" else {"in_channels": 16, "out_channels": 16}
    torch.manual_seed(0)
    getattr(diffusers, config["_class_name"]).from_config({**config, **changes}).save_pretrained(folder / "transformer")
    return folder


@pytest.mark.parametrize("family", SIZES)
def test_a_sampler_of_comfyui_draws_with_a_gang(comfy, with_xdit, tmp_path, family):
    folder = checkpoint(family, tmp_path / family)
    serial = sampled(comfy, family, folder, "", "")
    divided = sampled(comfy, family, folder, "usp", "usp.ulysses=2 usp.ring=1")
    assert not isinstance(serial, str), serial
    assert not isinstance(divided, str), divided
    assert np.isfinite(serial).all() and serial.std() > 0.1
    assert np.abs(serial - divided).max() <= 1e-4 * np.abs(serial).max()
    if family == "flux":
        assert "cannot divide a single call" in sampled(comfy, family, folder, "pipefusion", "pipefusion.patches=2")
        loras = comfy.folder / "models" / "loras"
        loras.mkdir(exist_ok=True)
        save_file({"x.lora_A.weight": np.zeros((1, 1), np.float32)}, loras / "style.safetensors")
        assert "write the file as lora=" in sampled(comfy, family, folder, "", "", "style.safetensors")
        assert "cannot be set in a workflow" in sampled(comfy, family, folder, "", "model.trust_remote_code=yes")
