"""Videos and contact sheets: written, and read back."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from xdit_core.outputs import results
from xdit_core.outputs.contact_sheet import GAP, LINE, SIDE, WIDE, contact_sheet, shortened
from xdit_core.outputs.names import sheet_path, targets
from xdit_core.outputs.results import write_sheet
from xdit_core.outputs.video import middle_frame, write_video
from xdit_core.settings import RunSettings


def plain(colour: str, size: tuple[int, int] = (48, 32)) -> Image.Image:
    return Image.new("RGB", size, colour)


@pytest.mark.parametrize("size", [(48, 32), (47, 31), (2, 2)])
def test_a_video_read_back(tmp_path: Path, size: tuple[int, int]) -> None:
    path = tmp_path / "x.part"
    write_video([plain(c, size) for c in ("red", "lime", "blue", "white", "black")], path, 5, 'a fox "ü"')
    with av.open(str(path)) as container:
        video = container.streams.video[0]
        frames = [
            f.reformat(format="rgb24", src_colorspace="ITU709", dst_colorspace="ITU601").to_ndarray()
            for f in container.decode(video=0)
        ]
        code = video.codec_context
        assert (code.colorspace, code.color_primaries, code.color_trc, code.color_range) == (
            1,
            1,
            1,
            1,
        )  # BT.709, narrow
        assert container.metadata["comment"] == 'a fox "ü"'
        assert (video.average_rate, video.codec_context.pix_fmt) == (5, "yuv420p")
    assert len(frames) == 5
    assert frames[0].shape == (size[1] + size[1] % 2, size[0] + size[0] % 2, 3)
    want = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)]
    for frame, colour in zip(frames, want, strict=True):
        assert np.abs(frame.astype(int) - colour).max() < 12
    assert middle_frame(path).getpixel((0, 0))[2] > 240


def test_a_video_of_one_frame_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("night:1.mp4")  # FFmpeg alone would look for the protocol "night"
    write_video([plain("red")], path, 16, "")
    assert middle_frame(path).size == (48, 32)
    with pytest.raises(ValueError, match="without frames"):
        write_video([], tmp_path / "y.mp4", 16, "")
    with pytest.raises(OSError):
        write_video([plain("red")], tmp_path / "no" / "y.mp4", 16, "")


def test_a_video_is_browser_ready_and_the_same_each_time(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (6, 32, 48, 3), dtype=np.uint8)
    for name in "ab":
        write_video([Image.fromarray(f) for f in noise], tmp_path / name, 8, "x")
    data = (tmp_path / "a").read_bytes()
    assert data == (tmp_path / "b").read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")  # plays before all of it is there


def test_an_output_of_videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two videos of one prompt: two files with their settings inside, and the same beside them."""
    from xdit_core.points.request import Output

    run = RunSettings(
        prompt=("a fox",), images=2, seed=(3,), frames=3, fps=5, out=str(tmp_path / "v.mp4"), height=32, width=48
    )
    plan: Any = SimpleNamespace(
        run=run, facts=SimpleNamespace(video=True, loras=()), model="wan", plugins={}, axes=(), split=(4,)
    )
    plan.patches, plan.fidelity, plan.values, plan.digest, plan.checkpoint = 1, {}, {}, lambda: "0", None
    videos = [[plain(c)] * 3 for c in ("red", "blue")]
    paths = targets(run, video=True)[0]
    for i, path in enumerate(paths):
        results.write(Output("a fox", numbers=range(2), images=videos), i, path, plan, {"denoise": 1.0})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["v-0.json", "v-0.mp4", "v-1.json", "v-1.mp4"]
    with av.open(str(tmp_path / "v-1.mp4")) as container:
        comment = container.metadata["comment"]
        assert (container.streams.video[0].average_rate, container.streams.video[0].frames) == (5, 3)
    beside = json.loads((tmp_path / "v-1.json").read_text())
    inside = json.loads(comment.splitlines()[-1])
    assert comment.startswith("a fox\n") and inside["seed"] == beside["seed"] == 4
    assert (inside["plan"]["frames"], inside["plan"]["fps"], beside["file"]) == (3, 5, "v-1.mp4")
    assert middle_frame(tmp_path / "v-1.mp4").getpixel((9, 9))[2] > 240
    many = RunSettings(prompt=("a b", "a", "a", "a") + ("b",) * 5000, images=2, out="d/")
    names = [path.name for row in targets(many, video=True) for path in row]
    assert names[:8] == [
        "a-b-0.mp4",
        "a-b-1.mp4",
        "a-0.mp4",
        "a-1.mp4",
        "a-0-2.mp4",
        "a-1-2.mp4",
        "a-0-3.mp4",
        "a-1-3.mp4",
    ]
    assert len(set(names)) == 10008


def test_a_contact_sheet(tmp_path: Path) -> None:
    plain("red").save(tmp_path / "a.png")
    write_video([plain("red"), plain("blue"), plain("red")], tmp_path / "b.mp4", 2, "")
    (tmp_path / "broken.mp4").write_bytes((tmp_path / "b.mp4").read_bytes()[:200])
    rows = [[tmp_path / "a.png", tmp_path / "b.mp4"], [tmp_path / "none.png", tmp_path / "broken.mp4"]]
    sheet, absent = contact_sheet(rows, ["a red\nthing", "x" * 300])
    assert sheet.size == (GAP + 2 * (SIDE + GAP), GAP + 2 * (SIDE + LINE + GAP))
    middle = (GAP + SIDE // 2, GAP + SIDE // 2)
    assert sheet.getpixel(middle) == (255, 0, 0)
    assert sheet.getpixel((middle[0] + SIDE + GAP, middle[1]))[2] > 240
    assert sheet.getpixel((middle[0], middle[1] + SIDE + LINE + GAP)) == (255, 255, 255)
    assert absent == [tmp_path / "none.png", tmp_path / "broken.mp4"]
    caption = np.asarray(sheet.crop((GAP, GAP + SIDE, GAP + SIDE, GAP + SIDE + LINE)))
    assert (caption < 128).any()  # somebody can read something
    wide, _ = contact_sheet([[tmp_path / "a.png"] * (WIDE + 9)], ["a"])  # as a square, not as a ribbon
    assert wide.size == (GAP + 5 * (SIDE + GAP), GAP + 5 * (SIDE + LINE + GAP))


def test_captions_fit() -> None:
    font: Any = SimpleNamespace(getlength=lambda text: 10 * len(text))
    assert shortened("a\n b", font) == "a b"
    assert shortened("word " * 9999, font) == "word word word word word…"


def test_where_it_goes_and_what_is_said(tmp_path: Path) -> None:
    plain("red").save(tmp_path / "a-0.png")
    run = RunSettings(prompt=("a", "b"), out=str(tmp_path))
    assert sheet_path(run) == tmp_path / "sheet.png"
    assert sheet_path(RunSettings(out="x/y.png")) == Path("x/y-sheet.png")
    line = write_sheet(run, [[tmp_path / "a-0.png"], [tmp_path / "b-0.png"]])
    assert line.endswith("sheet.png  the contact sheet, without b-0.png: not here or not readable")
    assert Image.open(tmp_path / "sheet.png").width == GAP + 2 * (SIDE + GAP)
    assert "of the first 400 of 402, without " in (line := write_sheet(run, [[tmp_path / "b.png"] * 201] * 2))
    assert line.endswith("b.png, b.png, b.png and 397 more: not here or not readable")
    assert write_sheet(run, [[tmp_path / "a-0.png"]]) == ""
    assert write_sheet(RunSettings(prompt=("a", "b"), output_type="latent"), [[Path("x")], [Path("y")]]) == ""
    gone = RunSettings(prompt=("a", "b"), out=str(tmp_path / "a-0.png" / "x.png"))
    assert "was not written" in write_sheet(gone, [[tmp_path / "a-0.png"], [tmp_path / "a-0.png"]])


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), MemoryError("too large"), RuntimeError("no font")]
)
def test_a_sheet_that_cannot_be_made_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr("xdit_core.outputs.contact_sheet.contact_sheet", fails)
    line = write_sheet(RunSettings(prompt=("a", "b"), out=str(tmp_path)), [[tmp_path / "a.png"], [tmp_path / "b.png"]])
    assert line.startswith(f"{tmp_path / 'sheet.png'} was not written: ") and line.endswith("; the pictures are there.")
    assert str(error.args[-1]) in line and not list(tmp_path.iterdir())
