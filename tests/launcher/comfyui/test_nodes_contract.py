"""The nodes without ComfyUI: what they declare, and how they behave where ComfyUI calls them."""

from __future__ import annotations

import json
import sys
import types
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("fastapi")

from helpers.comfyui.real_comfyui import NODES
from helpers.comfyui.scripted import STEPS, drawn, scripted
from helpers.launcher.served import wait_for
from helpers.models.tiny import saved
from xdit_comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from xdit_comfyui.client import Server, ServerError
from xdit_comfyui.pictures import image_of, opened, png_of, png_of_mask
from xdit_core.planning.planner import make_plan

PYTHON = {"STRING": str, "INT": int, "FLOAT": (int, float)}
TYPES = {*PYTHON, "IMAGE", "MASK", "MODEL"}


class Interrupted(Exception):
    """What ComfyUI raises when the user presses Cancel."""


class FakeComfy:
    """What the nodes use of ComfyUI; after so many progress messages, or at a text, the user presses Cancel."""

    def __init__(self):
        self.progress, self.texts, self.cancel_at, self.cancel_wanted = [], [], None, False
        fake = self

        class ProgressBar:
            def __init__(self, total):
                self.total = total

            def update_absolute(self, value, total=None, preview=None):
                fake.progress.append((value, total, preview))
                fake.cancel_wanted |= value == fake.cancel_at

        self.bar = ProgressBar

    def throw(self):
        if self.cancel_wanted:
            self.cancel_wanted = False
            raise Interrupted

    def send_progress_text(self, text, node):
        self.texts.append((text, node))


@pytest.fixture
def comfy(monkeypatch):
    fake = FakeComfy()
    modules = {
        "comfy": {},
        "comfy.utils": {"ProgressBar": fake.bar},
        "comfy.model_management": {"throw_exception_if_processing_interrupted": fake.throw},
        "server": {"PromptServer": types.SimpleNamespace(instance=fake)},
    }
    for name, content in modules.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("XDIT_SERVERS", "XDIT_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    return fake


@pytest.fixture(scope="module")
def plan():
    return make_plan([], {"model": "emoji", "device": "cpu", "steps": 5})


@pytest.fixture(scope="module")
def server(plan, tmp_path_factory):
    with scripted(plan, tmp_path_factory.mktemp("pictures")) as running:
        yield running


def run(name, server, **inputs):
    """Call a node as ComfyUI does: every input by name, those that are not given at their defaults."""
    node = NODE_CLASS_MAPPINGS[name]
    declared = node.INPUT_TYPES()
    values = {
        key: spec[1]["default"]
        for group in ("required", "optional")
        for key, spec in declared[group].items()
        if len(spec) > 1 and "default" in spec[1]
    }
    hidden = dict.fromkeys(declared.get("hidden", {}), "7")
    url = server if isinstance(server, str) else server.url
    return getattr(node(), node.FUNCTION)(**{**values, **hidden, "server": url, **inputs})


@pytest.mark.parametrize("name", NODE_CLASS_MAPPINGS)
def test_what_a_node_declares(name):
    node = NODE_CLASS_MAPPINGS[name]
    declared = node.INPUT_TYPES()
    assert set(declared) <= {"required", "optional", "hidden"} and NODE_DISPLAY_NAME_MAPPINGS[name].startswith("xdit ")
    for key, (kind, *more) in {**declared["required"], **declared.get("optional", {})}.items():
        assert isinstance(kind, list) or kind in TYPES, key
        assert kind in ("IMAGE", "MASK") or {"default", "tooltip"} <= set(more[0]), key
    assert name == "XditLoadModel" or declared["required"]["seed"][1]["control_after_generate"]
    assert set(node.RETURN_TYPES) <= TYPES and node.CATEGORY == "xdit" and callable(getattr(node, node.FUNCTION))
    assert len(getattr(node, "RETURN_NAMES", node.RETURN_TYPES)) == len(node.RETURN_TYPES)


def test_the_folder_works_by_itself():
    """In custom_nodes the package has another name, and xdit may not be installed."""
    for path in NODES.glob("*.py"):
        for line in path.read_text(encoding="utf-8").splitlines():
            assert not line.startswith(("import xdit", "from xdit")), path


def test_pictures_and_progress(server, comfy):
    (image,) = run("XditGenerate", server, prompt="a watched fox", seed=5, images=2, previews=1)
    assert image.shape == (2, 16, 16, 3) and image.dtype == torch.float32 and 0 <= image.min() < image.max() <= 1
    for i, seed in enumerate((5, 6)):
        assert np.array_equal((image[i] * 255).numpy().astype(np.uint8), np.asarray(opened(drawn(seed))))
    assert [value for value, _, preview in comfy.progress if preview is None] == list(range(1, STEPS + 1))
    assert {total for _, total, _ in comfy.progress} == {STEPS}
    (preview,) = [preview for _, _, preview in comfy.progress if preview]
    assert preview[0] == "JPEG" and preview[1].size == (16, 16) and preview[2] == 512
    assert server.jobs()[0].request["settings"] == {"seed": 5, "images": 2}


def test_what_is_given_goes_to_the_server(server, comfy):
    given = {"negative": "blue", "steps": 3, "guidance": 0.0, "width": 64, "height": 96}
    run("XditGenerate", server, prompt="a red fox", **given)
    assert server.jobs()[0].request["settings"] == {**given, "seed": 0, "images": 1}


def test_loras_are_those_of_the_server(server, comfy):
    with pytest.raises(ServerError, match="there is no LoRA 'ink'; none is allowed here"):
        run("XditGenerate", server, prompt="a red fox", lora="ink:0.5")


def test_cancel_ends_the_job_on_the_server(server, comfy):
    comfy.cancel_at = STEPS
    with pytest.raises(Interrupted):
        run("XditGenerate", server, prompt="wait for it")
    wait_for(lambda: server.jobs()[0].status == "cancelled")


def test_a_job_in_the_queue_shows_its_place_and_can_be_cancelled(server, comfy):
    busy = Server(server.url).ask("POST", "/v1/jobs", {"prompt": "wait for it"})["id"]
    wait_for(lambda: server.dispatcher.store.find(busy).status == "running")
    comfy.send_progress_text = lambda text, node: (
        comfy.texts.append((text, node)),
        setattr(comfy, "cancel_wanted", "queue" in text),
    )
    with pytest.raises(Interrupted):
        run("XditGenerate", server, prompt="a red fox")
    assert comfy.texts == [("number 1 in the queue", "7")] and server.jobs()[0].status == "cancelled"
    Server(server.url).ask("DELETE", f"/v1/jobs/{busy}")


def test_the_server_has_the_word(server, comfy):
    for inputs, sentence in (
        ({"prompt": ""}, "there is no prompt"),
        ({"prompt": "x", "steps": 5000}, "steps=5000 is more than this server allows"),
        ({"prompt": "fail"}, "take a lower guidance"),
    ):
        with pytest.raises(ServerError, match=sentence):
            run("XditGenerate", server, **inputs)
    with pytest.raises(ServerError, match=r"makes pictures; use the node xdit Generate \(server\)"):
        run("XditVideo", server, prompt="a red fox")


def test_an_edit_is_sent_and_the_answer_shown(server, comfy):
    image = image_of([drawn(1), drawn(2)])
    with pytest.raises(ServerError, match="draws from text only and takes no picture"):
        run("XditEdit", server, image=image, mask=torch.zeros(1, 16, 16), prompt="a hat")
    with pytest.raises(ServerError, match="width and height go together"):
        run("XditEdit", server, image=image, prompt="a hat", width=64)


def test_pictures_and_masks_become_files(tmp_path):
    assert np.array_equal(np.asarray(opened(png_of(image_of([drawn(9)])[0]))), np.asarray(opened(drawn(9))))
    mask = torch.zeros(1, 2, 3)
    mask[0, 1, 2] = 1
    (tmp_path / "mask.png").write_bytes(png_of_mask(mask))
    alpha = np.asarray(Image.open(tmp_path / "mask.png"))[..., 3]
    assert alpha.tolist() == [[255, 255, 255], [255, 255, 0]]


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("http://127.0.0.1:9", "there is no answer from http://127.0.0.1:9"),
        ("127.0.0.1:8000", "is no address; write for example"),
        ("http://[", "is no address"),
    ],
)
def test_a_server_that_is_not_there(comfy, address, sentence):
    with pytest.raises(ServerError, match=sentence.replace("[", r"\[")):
        run("XditGenerate", address, prompt="a red fox")


def test_keys(plan, comfy, monkeypatch, tmp_path):
    (tmp_path / "keys").write_text("a-key-of-the-tests-of-comfyui\n")
    with scripted(plan, tmp_path / "data", str(tmp_path / "keys")) as server:
        with pytest.raises(ServerError, match=r"this server needs a key.*XDIT_API_KEY"):
            run("XditGenerate", server, prompt="a red fox")
        monkeypatch.setenv("XDIT_API_KEY", "a-key-of-the-tests-of-comfyui")
        assert run("XditGenerate", server, prompt="a red fox")[0].shape[0] == 1


def test_a_workflow_from_elsewhere_gets_no_secret(comfy, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("XDIT_API_KEY", "secret")
    with pytest.raises(ServerError, match="does not begin with XDIT_"):
        run("XditGenerate", "http://127.0.0.1:9", prompt="x", key_variable="AWS_SECRET_ACCESS_KEY")
    with pytest.raises(ServerError, match="start ComfyUI with XDIT_SERVERS="):
        run("XditGenerate", "http://192.0.2.1:8000", prompt="x")
    monkeypatch.setenv("XDIT_SERVERS", "http://gpu:8000/, http://b:8000")
    assert NODE_CLASS_MAPPINGS["XditGenerate"].INPUT_TYPES()["required"]["server"][1]["default"] == "http://gpu:8000"


def test_videos(comfy, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = saved("wan", tmp_path / "wan")
    values = {"model": "wan", "model.path": str(folder), "device": "cpu", "max_sequence_length": 7}
    plan = make_plan([], {**values, "height": 32, "width": 48, "frames": 5, "steps": 3})
    with scripted(plan, tmp_path / "data") as server:
        frames, fps = run("XditVideo", server, prompt="a red fox", frames=5)
        assert frames.shape == (5, 16, 16, 3) and fps == 16
        assert abs(float(frames[0, ..., 2].mean()) - np.asarray(opened(drawn(0)))[..., 2].mean() / 255) < 0.1
        with pytest.raises(ServerError, match="makes videos; use the node xdit Video"):
            run("XditGenerate", server, prompt="a red fox")


@pytest.mark.parametrize("path", sorted((NODES / "example_workflows").glob("*.json")), ids=lambda path: path.stem)
def test_example_workflows_fit_the_nodes(path):
    """A saved workflow lists the values of a node in the order of its inputs."""
    for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]:
        if node["type"] not in NODE_CLASS_MAPPINGS:
            continue
        declared = NODE_CLASS_MAPPINGS[node["type"]].INPUT_TYPES()
        kinds = []
        for kind, *more in (*declared["required"].values(), *declared.get("optional", {}).values()):
            if isinstance(kind, list):
                kinds.append(str)
            elif kind in PYTHON:
                kinds += [PYTHON[kind]] + [str] * bool(more[0].get("control_after_generate"))
        assert len(node["widgets_values"]) == len(kinds)
        assert all(isinstance(value, kind) for value, kind in zip(node["widgets_values"], kinds, strict=True))
