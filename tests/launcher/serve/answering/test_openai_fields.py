"""Every argument of the official client is honoured or refused, as the page of fields says."""

from __future__ import annotations

import base64
import inspect
import io
import re
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("fastapi")
pytest.importorskip("openai")

import openai

from helpers.launcher.answering import answering
from helpers.launcher.fake_gangs import PNG, until

PAGE = Path(__file__).parents[4] / "docs" / "use" / "openai.md"
pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="needs the source tree")
OF_THE_CLIENT = ("self", "extra_headers", "extra_query", "extra_body", "timeout")
# Each argument with those that it needs, and what shows its effect in an answer and in what the gang was asked for.
HONOURED = {
    "prompt": ({"prompt": "rocket"}, lambda answer, job: job.request.prompts == ("rocket",)),
    "background": ({"background": "opaque"}, lambda answer, job: answer.background == "opaque"),
    "model": ({"model": "emoji"}, lambda answer, job: True),
    "moderation": ({"moderation": "low"}, lambda answer, job: True),
    "n": ({"n": 2}, lambda answer, job: job.request.settings["images"] == 2),
    "output_compression": (
        {"output_compression": 3, "output_format": "jpeg"},
        lambda answer, job: len(picture(answer)) < len(as_jpeg()),
    ),
    "output_format": ({"output_format": "webp"}, lambda answer, job: picture(answer)[8:12] == b"WEBP"),
    "partial_images": ({"partial_images": 2, "stream": True}, lambda answer, job: job.request.previews == 2),
    "quality": ({"quality": "low"}, lambda answer, job: job.request.settings["steps"] == 10),
    "response_format": ({"response_format": "url"}, lambda answer, job: answer.data[0].url.startswith("http://")),
    "safety_identifier": (
        {"safety_identifier": "me", "stream": True},
        lambda answer, job: answer[-1].safety_identifier == "me",
    ),
    "size": ({"size": "64x128"}, lambda answer, job: answer.size == "64x128" and job.request.settings["width"] == 64),
    "stream": ({"stream": True}, lambda answer, job: answer[-1].type == "image_generation.completed"),
    "user": ({"user": "me", "stream": True}, lambda answer, job: answer[-1].safety_identifier == "me"),
}
REFUSED = {
    "complexity": {"complexity": "low"},
    "frame_count": {"frame_count": 2},
    "frame_duration_ms": {"frame_duration_ms": 20},
    "style": {"style": "vivid"},
    "svg": {"svg": {}},
}
REFUSED_VALUES = (
    {"background": "transparent"},
    {"output_format": "gif"},
    {"quality": "best"},
    {"size": "large"},
    {"size": "33x32"},
    {"response_format": "file"},
    {"moderation": "strict"},
    {"n": 0},
    {"partial_images": 1},
    {"output_compression": 50},
)
FILE = ("picture.png", PNG, "image/png")
EDITS = {"image": FILE, "mask": FILE, "markup": FILE, "input_fidelity": "low"} | REFUSED
EDITS |= {name: values[name] for name, (values, _) in HONOURED.items()} | {"stream": False}
EDITS = {name: value for name, value in EDITS.items() if name not in ("style", "moderation")}


def picture(answer):
    return base64.b64decode(answer.data[0].b64_json)


def as_jpeg():
    buffer = io.BytesIO()
    Image.open(io.BytesIO(PNG)).convert("RGB").save(buffer, "JPEG", quality=100)
    return buffer.getvalue()


def documented(method: str) -> dict[str, str]:
    """The arguments in the table of a method, each with its first word."""
    part = PAGE.read_text().split(f"## {method}\n")[1].split("\n## ")[0]
    return dict(re.findall(r"^\| `(\w+)` \| (\w+)", part, re.M))


def arguments(method) -> set[str]:
    return set(inspect.signature(method).parameters) - set(OF_THE_CLIENT)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with answering(tmp_path_factory.mktemp("fields")) as (url, gangs):
        until(lambda: gangs.gangs)
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            yield client, gangs.gangs[0]


@pytest.mark.parametrize("method", ["images.generate", "images.edit", "videos.create"])
def test_the_page_has_every_argument_of_the_client(method):
    group, _, name = method.partition(".")
    client = openai.OpenAI(base_url="http://localhost", api_key="none")
    assert set(documented(method)) == arguments(getattr(getattr(client, group), name))


def test_the_page_says_what_the_tests_show():
    words = documented("images.generate")
    assert {name for name, word in words.items() if word == "honoured"} == set(HONOURED)
    assert {name for name, word in words.items() if word == "refused"} == set(REFUSED)
    assert set(documented("images.edit").values()) == {"refused"} and set(documented("images.edit")) == set(EDITS)


@pytest.mark.parametrize("name", HONOURED)
def test_what_is_honoured_has_its_effect(served, name):
    client, gang = served
    values, effect = HONOURED[name]
    answer = client.images.generate(**{"prompt": "red heart", **values})
    answer = list(answer) if values.get("stream") else answer
    assert effect(answer, gang.jobs[-1])


@pytest.mark.parametrize("values", [*REFUSED.values(), *REFUSED_VALUES], ids=str)
def test_what_is_refused_is_named(served, values):
    client, gang = served
    before, name = len(gang.jobs), next(iter(values))
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(prompt="red heart", **values)
    said = caught.value.body
    assert name in (said["param"] or "") or name in said["message"] or name == "size", said
    assert len(gang.jobs) == before


@pytest.mark.parametrize("name", EDITS)
def test_edits_are_refused_whatever_they_ask_for(served, name):
    with pytest.raises(openai.BadRequestError, match=r"takes no picture|no field"):
        served[0].images.edit(**{"image": FILE, "prompt": "x", name: EDITS[name]})


def test_another_model_is_not_there(served):
    with pytest.raises(openai.NotFoundError, match="write emoji"):
        served[0].images.generate(prompt="x", model="gpt-image-1")
