"""The official client, as it is, against a server."""

from __future__ import annotations

import base64
import io

import pytest
from PIL import Image

from helpers.launcher.served import Served, wait_for

openai = pytest.importorskip("openai")


@pytest.fixture
def client(server: Served):
    with server.openai() as client:
        yield client


def picture(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


def test_pictures_come_as_text(client):
    answer = client.images.generate(prompt="a red fox", model="sd3", n=2, size="32x32", extra_body={"seed": 7})
    assert [picture(item.b64_json).size for item in answer.data] == [(32, 32), (32, 32)]
    assert [item.seed for item in answer.data] == [7, 8]
    assert (answer.output_format, answer.size, answer.background, answer.quality) == (
        "png",
        "32x32",
        "opaque",
        "medium",
    )
    assert answer.usage.output_tokens == 2 * 64 and answer.usage.total_tokens > 2 * 64
    first, again = (client.images.generate(prompt="a red fox", extra_body={"seed": 7}).data[0] for _ in range(2))
    assert again.b64_json == first.b64_json
    other = client.images.generate(prompt="a red fox").data[0]  # a random seed
    assert other.b64_json != first.b64_json


@pytest.mark.parametrize("form", ["jpeg", "webp"])
def test_other_formats(client, form):
    answer = client.images.generate(prompt="a red fox", output_format=form, output_compression=40)
    assert picture(answer.data[0].b64_json).format == form.upper() and answer.output_format == form


def test_an_address_needs_no_key(client, http):
    url = client.images.generate(prompt="a red fox", response_format="url").data[0].url
    answer = http.get(url)
    assert answer.status_code == 200 and answer.headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(answer.content)).size == (32, 32)


@pytest.mark.parametrize(("quality", "steps"), [("low", 2), ("auto", 3), ("high", 4), ("max", 9)])
def test_quality_is_a_number_of_steps(client, http, quality, steps):
    answer = client.images.generate(prompt="a red fox", quality=quality)
    assert http.get(f"/v1/jobs/{answer.job}").json()["settings"]["steps"] == steps


def test_a_stream_with_partial_images(client):
    events = list(
        client.images.generate(
            prompt="a red fox", stream=True, partial_images=3, output_format="jpeg", extra_body={"steps": 12}
        )
    )
    kinds = [event.type for event in events]
    assert kinds == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    assert [event.partial_image_index for event in events[:3]] == [0, 1, 2]
    assert all(picture(event.b64_json).format == "JPEG" for event in events)
    assert len({event.b64_json for event in events}) == 4
    assert events[-1].usage.output_tokens == 64 and events[-1].output_format == "jpeg"


WRONG = [
    ({"prompt": " "}, "prompt", "there is no prompt"),
    ({"prompt": "x" * 5000}, "prompt", "5000 characters"),
    ({"prompt": "\0"}, "prompt", "zero byte"),
    ({"n": 0}, "n", "n is wrong"),
    ({"n": 11}, "images", "images=11 is more"),
    ({"size": "13x32"}, "width", "width=13 is not a multiple"),
    ({"size": "big"}, "size", "size=big is no size"),
    ({"size": "9999x9999"}, "width", "pixels"),
    ({"quality": "best"}, "quality", "quality=best is not known"),
    ({"background": "transparent"}, "background", "opaque"),
    ({"output_format": "gif"}, "output_format", "png, jpeg, webp"),
    ({"output_compression": 5}, "output_compression", "jpeg and webp"),
    ({"partial_images": 2}, "partial_images", "stream=true"),
    ({"response_format": "url", "stream": True}, "response_format", "b64_json"),
    ({"style": "vivid"}, "style", "describe it in the prompt"),
    ({"moderation": "none"}, "moderation", "is not known"),
    ({"extra_body": {"lora": "x"}}, "lora", "there is no LoRA 'x'; known are ink, wash."),
    ({"extra_body": {"lora": {"ink": "0.5"}}}, "lora", "lora: ink has the scale 0.5; give a number from -100"),
    ({"extra_body": {"loras": {"ink": 1}}}, "loras", "there is no field loras"),
    ({"extra_body": {"steps": "3"}}, "steps", "steps is wrong"),
    ({"extra_body": {"steps": 3}, "quality": "low"}, "steps", "one of them"),
    ({"extra_body": {"seed": -1}}, "seed", "between 0 and"),
    ({"extra_body": {"seed": [1, 2, 3]}, "n": 2}, "seed", "one for each picture"),
]


@pytest.mark.parametrize(("more", "param", "says"), WRONG, ids=lambda value: str(value)[:30])
def test_what_is_refused(client, more, param, says):
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(**{"prompt": "a red fox", **more})
    assert caught.value.param == param and says in caught.value.body["message"]
    assert caught.value.type == "invalid_request_error"


def test_another_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.images.generate(prompt="a red fox", model="gpt-image-1")
    assert caught.value.code == "model_not_found" and "sd3" in str(caught.value)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-image-1")


def test_the_model(client):
    assert [model.id for model in client.models.list()] == ["sd3"] == [client.models.retrieve("sd3").id]


def png(width: int = 8, height: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (png(), "draws from text only"),
        (b"no picture", "cannot be read as a picture"),
        (png()[:45], "cannot be read as a picture"),
        (png(6000, 6000), "more than 16777216 pixels"),
    ],
    ids=["whole", "text", "half", "bomb"],
)
def test_an_edit_is_checked_and_refused(client, data, says):
    with pytest.raises(openai.BadRequestError, match=says) as caught:
        client.images.edit(image=[("a.png", data, "image/png")], mask=("m.png", png(), "image/png"), prompt="x")
    assert caught.value.param == "image"


def test_videos_are_refused_by_a_model_of_pictures(client):
    with pytest.raises(openai.BadRequestError, match="makes pictures and no videos"):
        client.videos.create(prompt="a red fox")


def test_a_client_that_vanishes_cancels_its_job(server, client, http):
    def jobs(status: str) -> list[str]:
        return [job["id"] for job in http.get("/v1/jobs", params={"status": status, "limit": 100}).json()["data"]]

    before = jobs("cancelled")
    with pytest.raises(openai.APITimeoutError):
        client.images.generate(prompt="a red fox", timeout=1.0, extra_body={"steps": 2000})
    new = wait_for(lambda: set(jobs("cancelled")) - set(before), server.log)
    stream = client.images.generate(prompt="a red fox", stream=True, partial_images=3, extra_body={"steps": 2000})
    wait_for(lambda: jobs("running"))
    stream.close()
    wait_for(lambda: len(set(jobs("cancelled")) - set(before) - new) == 1, server.log)
    assert client.images.generate(prompt="a red fox").data
