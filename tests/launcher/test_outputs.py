"""Videos and contact sheets: written, and read back."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from xdit_core.outputs import sheet_path, write_sheet
from xdit_core.settings import RunSettings
from xdit_core.sheet import GAP, LINE, SIDE, contact_sheet
from xdit_core.video import middle_frame, write_video


def plain(colour: str, size: tuple[int, int] = (48, 32)) -> Image.Image:
    return Image.new("RGB", size, colour)


@pytest.mark.parametrize("size", [(48, 32), (47, 31), (2, 2)])
def test_a_video_read_back(tmp_path: Path, size: tuple[int, int]) -> None:
    path = tmp_path / "x.part"
    write_video([plain(c, size) for c in ("red", "lime", "blue", "white", "black")], path, 5, 'a fox "ü"')
    with av.open(str(path)) as container:
        video = container.streams.video[0]
        frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
        assert container.metadata["comment"] == 'a fox "ü"'
        assert (video.average_rate, video.codec_context.pix_fmt) == (5, "yuv420p")
    assert len(frames) == 5
    assert frames[0].shape == (size[1] + size[1] % 2, size[0] + size[0] % 2, 3)
    want = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)]
    for frame, colour in zip(frames, want, strict=True):
        assert np.abs(frame.astype(int) - colour).max() < 12
    assert middle_frame(path).getpixel((0, 0))[2] > 240


def test_a_video_of_one_frame(tmp_path: Path) -> None:
    write_video([plain("red")], tmp_path / "x.mp4", 16, "")
    assert middle_frame(tmp_path / "x.mp4").size == (48, 32)


def test_a_contact_sheet(tmp_path: Path) -> None:
    plain("red").save(tmp_path / "a.png")
    write_video([plain("red"), plain("blue"), plain("red")], tmp_path / "b.mp4", 2, "")
    rows = [[tmp_path / "a.png", tmp_path / "b.mp4"], [tmp_path / "none.png", tmp_path / "a.png"]]
    sheet, absent = contact_sheet(rows, ["a red\nthing", "x" * 300])
    assert sheet.size == (GAP + 2 * (SIDE + GAP), GAP + 2 * (SIDE + LINE + GAP))
    middle = (GAP + SIDE // 2, GAP + SIDE // 2)
    assert sheet.getpixel(middle) == (255, 0, 0)
    assert sheet.getpixel((middle[0] + SIDE + GAP, middle[1]))[2] > 240
    assert absent == [tmp_path / "none.png"]
    caption = np.asarray(sheet.crop((GAP, GAP + SIDE, GAP + SIDE, GAP + SIDE + LINE)))
    assert (caption < 128).any()  # somebody can read something


def test_where_it_goes_and_what_is_said(tmp_path: Path) -> None:
    plain("red").save(tmp_path / "a-0.png")
    run = RunSettings(prompt=("a", "b"), out=str(tmp_path))
    assert sheet_path(run) == tmp_path / "sheet.png"
    assert sheet_path(RunSettings(out="x/y.png")) == Path("x/y-sheet.png")
    line = write_sheet(run, [[tmp_path / "a-0.png"], [tmp_path / "b-0.png"]])
    assert line.endswith("the contact sheet, without 1 files that are not here or too many")
    assert Image.open(tmp_path / "sheet.png").width == GAP + 2 * (SIDE + GAP)
    assert write_sheet(run, [[tmp_path / "a-0.png"]]) == ""
    assert write_sheet(RunSettings(prompt=("a", "b"), output_type="latent"), [[Path("x")], [Path("y")]]) == ""
    gone = RunSettings(prompt=("a", "b"), out=str(tmp_path / "no" / "x.png"))
    assert "was not written" in write_sheet(gone, [[tmp_path / "a-0.png"], [tmp_path / "a-0.png"]])
