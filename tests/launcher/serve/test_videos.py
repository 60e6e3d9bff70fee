"""The official client's videos against a server with a tiny model that makes them."""

from __future__ import annotations

import io
import warnings

import pytest
from PIL import Image

from helpers.launcher.served import Served, wait_for
from helpers.models.tiny import saved

openai = pytest.importorskip("openai")
pytestmark = pytest.mark.filterwarnings("ignore:.*Sora.*")


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    words = ("height=32", "width=48", "frames=5", "steps=3", "max_sequence_length=7", "device=cpu", "serve.steps=2000")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = saved("wan", folder / "wan")
    served = Served(folder / "server", "model=wan", f"model.path={path}", *words).ready()
    with served.openai() as client:
        yield client.videos
    served.close()
    assert "Traceback" not in served.log()


def test_a_video_from_create_to_delete(videos):
    made = videos.create_and_poll(prompt="a red fox", seconds="0.6", size="48x32", extra_body={"seed": 4, "steps": 4})
    assert (made.status, made.progress, made.size, made.model) == ("completed", 100, "48x32", "wan")
    assert float(made.seconds) == pytest.approx(9 / 16, abs=1e-4)  # 9 frames: the nearest of 5, 9, 13
    data = videos.download_content(made.id).read()
    assert data[4:8] == b"ftyp" and len(frames(data)) == 9
    thumbnail = Image.open(io.BytesIO(videos.download_content(made.id, variant="thumbnail").read()))
    assert (thumbnail.format, thumbnail.size) == ("WEBP", (48, 32))
    sheet = Image.open(io.BytesIO(videos.download_content(made.id, variant="spritesheet").read()))
    assert (sheet.format, sheet.size) == ("JPEG", (3 * 48, 3 * 32))
    assert made.id in [video.id for video in videos.list(limit=5)]
    assert videos.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError):
        videos.retrieve(made.id)


def frames(data: bytes) -> list:
    import av

    with av.open(io.BytesIO(data)) as container:
        return list(container.decode(video=0))


def test_delete_stops_the_one_that_is_drawn(videos):
    long = videos.create(prompt="a red fox", extra_body={"steps": 2000})
    other = videos.create(prompt="a blue fox")
    progress = wait_for(lambda: videos.retrieve(long.id).progress)
    assert 0 < progress < 100 and videos.retrieve(long.id).status == "in_progress"
    answer = videos.with_raw_response.retrieve(other.id)
    assert int(answer.headers["openai-poll-after-ms"]) >= 200 and answer.parse().status == "queued"
    with pytest.raises(openai.NotFoundError):
        videos.download_content(other.id)
    assert videos.delete(long.id).deleted
    assert wait_for(lambda: videos.retrieve(other.id).status == "completed")
    assert videos.delete(other.id).deleted and list(videos.list()) == []


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"input_reference": ("a.png", b"x", "image/png")}, "text only"),
        ({"seconds": "many"}, "seconds is wrong"),
        ({"size": "48by32"}, "is no size"),
        ({"seconds": "4", "extra_body": {"frames": 5}}, "one of them"),
        ({"seconds": "900"}, "more than this server allows"),
        ({"extra_body": {"style": "x"}}, "there is no field style"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_what_is_refused(videos, more, says):
    with pytest.raises(openai.BadRequestError, match=says):
        videos.create(prompt="a red fox", **more)


@pytest.mark.parametrize(
    ("values", "effect"),
    [
        ({"prompt": "a blue bird"}, lambda made: made.prompt == "a blue bird"),
        ({"model": "wan"}, lambda made: made.model == "wan"),
        ({"seconds": "0.3"}, lambda made: float(made.seconds) == pytest.approx(5 / 16, abs=1e-4)),
        ({"size": "32x48"}, lambda made: made.size == "32x48"),
    ],
    ids=["prompt", "model", "seconds", "size"],
)
def test_every_argument_of_the_client_has_its_effect(videos, values, effect):
    assert effect(videos.create(**{"prompt": "a red fox", **values}))


def test_a_picture_to_begin_with_is_refused(videos):
    with pytest.raises(openai.BadRequestError, match="input_reference"):
        videos.create(prompt="a red fox", input_reference=("a.png", b"x", "image/png"))
