"""Files of results: nothing that is there is lost, nothing that was drawn is lost, and what cannot be written is known
before."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from xdit_core.errors import UsageError, XditError
from xdit_core.filesystem import atomically, read_text
from xdit_core.outputs import results
from xdit_core.outputs.existing import FilesThere
from xdit_core.outputs.metadata import embedded_settings
from xdit_core.outputs.names import all_files, json_path, sheet_path, targets
from xdit_core.plan import Plan
from xdit_core.planning.planner import make_plan
from xdit_core.points.request import Job, Output, jobs_for, joined
from xdit_core.settings import RunSettings, parse_words
from xdit_core.worker.heartbeat import HeartbeatWriter, heartbeat_path, read_heartbeat
from xdit_core.worker.writer import Writer


@pytest.fixture
def plan_of(tiny: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Plan]:
    """A plan of further words, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *words: make_plan([], parse_words([*tiny, *words]))


def picture(prompt: str = "a fox", index: int = 0, numbers: range = range(1)) -> Output:
    return Output(prompt, index, numbers, images=[Image.new("RGB", (32, 32), "red") for _ in numbers])


def draw(plan: Plan, *numbers: int) -> None:
    """Write some of the pictures of the first prompt, or all of them."""
    for i in numbers or range(plan.run.images):
        results.write(picture(plan.run.prompt[0], 0, range(i, i + 1)), 0, targets(plan.run)[0][i], plan, {})


def test_a_json_file_of_somebody_else_stays(plan_of: Callable[..., Plan]) -> None:
    plan = plan_of("prompt=a fox", "out=package.png")
    Path("package.json").write_text('{"name": "site"}')
    draw(plan)
    assert Path("package.json").read_text() == '{"name": "site"}'
    beside = json.loads(Path("package.png.json").read_text())
    assert (beside["format"], beside["file"]) == ("xdit result", "package.png")
    draw(plan)  # once more: that one is ours
    assert sorted(p.name for p in Path().iterdir()) == ["package.json", "package.png", "package.png.json"]
    video = Path("package.mp4")  # whose JSON may not replace that of the picture
    assert json_path(video).name == "package.mp4.json"
    Path("package.png.json").unlink()
    Path("package.png.json").mkdir()
    draw(plan)
    assert Path("package.png-2.json").is_file()


def test_a_sheet_of_somebody_else_stays(tmp_path: Path) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "sheet.png")
    before = (tmp_path / "sheet.png").read_bytes()
    run = RunSettings(prompt=("a", "b"), out=str(tmp_path))
    for _ in range(2):  # the second time it is ours
        assert results.write_sheet(run, [[tmp_path / "sheet.png"]] * 2).startswith(
            f"{tmp_path / 'sheet-2.png'}  the contact"
        )
    assert (tmp_path / "sheet.png").read_bytes() == before and sheet_path(run).name == "sheet-2.png"
    assert len(list(tmp_path.iterdir())) == 2


def test_pictures_that_are_there(plan_of: Callable[..., Plan]) -> None:
    """Those of earlier runs are replaced and announced, others are kept; overwrite= says otherwise."""
    plan = plan_of("prompt=a fox", "images=3", "out=o/fox.png")
    draw(plan, 0)
    assert [str(p) for p in FilesThere.here(plan).replaced] == ["o/fox-0.png"]
    assert list(FilesThere.here(plan).lines(plan)) == ["replacing o/fox-0.png; overwrite=no would keep what is there"]
    with pytest.raises(UsageError, match=r"overwrite=no and o/fox-0\.png is there; choose another place with out="):
        results.check_writable(plan_of("prompt=a fox", "images=3", "out=o/fox.png", "overwrite=no"))
    Path("o/fox-1.png").write_bytes(Path("o/fox-0.png").read_bytes()[:8] + b"not ours")
    with pytest.raises(UsageError, match=r"o/fox-1\.png is there and not written by xdit; .* overwrite=yes"):
        results.check_writable(plan)
    results.check_writable(plan_of("prompt=a fox", "images=3", "out=o/fox.png", "overwrite=yes"))
    Path("o/fox-1.png").write_bytes(b"")  # as mktemp makes it
    results.check_writable(plan)


def test_resume_keeps_what_has_the_same_settings(plan_of: Callable[..., Plan]) -> None:
    words = ("prompt=a fox", "images=3", "out=o")
    plan = plan_of(*words)
    draw(plan, 0, 2)
    again = plan_of(*words, "resume=yes", "overwrite=no", "timeout=77")
    found = FilesThere.here(again)
    assert {p.name for p in found.kept} == {"a-fox-0.png", "a-fox-2.png"} and not found.replaced
    assert found.skipped(again) == {(0, 0), (0, 2)} and found.left(again) == 1
    assert list(found.lines(again)) == ["2 of 3 are there with these settings; drawing 1"]
    elsewhere = FilesThere().with_others([FilesThere().to_json(), found.to_json()])  # on another rank's disk
    assert elsewhere == found
    other = plan_of(*words, "resume=yes", "guidance=2")
    assert not FilesThere.here(other).kept and len(FilesThere.here(other).replaced) == 2
    assert not FilesThere.here(plan).kept


@pytest.mark.parametrize("suffix", ["safetensors", "mp4"])
def test_settings_are_read_back_from_every_format(tmp_path: Path, plan_of: Callable[..., Plan], suffix: str) -> None:
    plan = plan_of("prompt=a fox", "output_type=latent")
    path = tmp_path / f"x.{suffix}"
    latents = Output("a fox", latents=torch.zeros(1, 4, 8, 8))
    results.write(
        latents if suffix == "safetensors" else Output("a", images=[[Image.new("RGB", (32, 32))] * 2]),
        0,
        path,
        plan,
        {},
    )
    found = embedded_settings(path)
    assert found is not None and found["plan"]["digest"] == plan.digest()
    data = path.read_bytes()
    for broken in (data[:60], b"\xff" * 99, b"[" * 5000, b""):
        path.write_bytes(broken)
        assert embedded_settings(path) is None


def test_only_the_rest_is_drawn() -> None:
    assert jobs_for(["a", "b"], 3, {(0, 1), (1, 0), (1, 1), (1, 2)}) == (
        Job("a", 0, range(0, 1)),
        Job("a", 0, range(2, 3)),
    )
    assert jobs_for(["a"], 2) == (Job("a", 0, range(2)),)
    parts = [picture(numbers=range(0, 1)), picture(numbers=range(2, 3)), picture(numbers=range(3, 4))]
    assert [o.numbers for o in joined(parts)] == [range(0, 1), range(2, 4)]


@pytest.mark.parametrize(
    ("out", "part"),
    [
        ("x" * 300 + ".png", "has 304 bytes and "),
        ("d/" + "x" * 251 + ".png", "json|has 256 bytes"),  # the picture would fit, its JSON does not
        ("x" * 300 + "/", "has 300 bytes"),
        ("/".join(["d" * 200] * 30) + "/x.png", "longer than 4096 bytes"),
        ("~nosuchuser/x.png", "the home folder of ~nosuchuser is not known"),
        ("circle.png", "circle.png: Too many levels of symbolic links"),
        ("nowhere.png", "/gone/deep: Permission denied|/proc|cannot be written"),
        ("dangling/x.png", "dangling is a link that leads nowhere"),
        ("in/", "in/a-fox-0.png is a folder"),
    ],
)
def test_a_name_that_cannot_be_is_found_before(plan_of: Callable[..., Plan], out: str, part: str) -> None:
    plan = plan_of("prompt=a fox", "out=ok.png")
    Path("circle.png").symlink_to("circle.png")
    Path("nowhere.png").symlink_to("/proc/gone/x.png")
    Path("dangling").symlink_to("/gone/deep")
    Path("in/a-fox-0.png/x").mkdir(parents=True)
    before = sorted(map(str, Path().rglob("*")))
    with pytest.raises(UsageError, match=part) as caught:
        results.check_writable(dataclasses.replace(plan, run=dataclasses.replace(plan.run, out=out)))
    assert str(caught.value).endswith(".") and ";" in str(caught.value)
    assert sorted(map(str, Path().rglob("*"))) == before  # not even a folder was made


def test_a_name_of_the_greatest_length_is_written(plan_of: Callable[..., Plan]) -> None:
    plan = plan_of("prompt=a fox", f"out={'x' * 250}.png")
    results.check_writable(plan)
    draw(plan)
    assert len(list(Path().iterdir())) == 2


def test_the_folder_is_made_when_writing(plan_of: Callable[..., Plan]) -> None:
    """The check makes nothing, and a folder that is deleted in between is made again."""
    plan = plan_of("prompt=a fox", "out=new/deep/")
    results.check_writable(plan)
    assert not Path("new").exists()
    draw(plan)
    assert Path("new/deep/a-fox-0.png").is_file()


def test_links_stay_and_pipes_are_written_into(plan_of: Callable[..., Plan]) -> None:
    plan = plan_of("prompt=a fox", "out=link.png")
    Path("far").mkdir()
    Path("link.png").symlink_to("far/fox.png")
    results.check_writable(plan)
    draw(plan)
    assert Path("link.png").is_symlink() and Image.open("far/fox.png").size == (32, 32)
    assert [p.name for p in Path("far").iterdir()] == ["fox.png"]
    os.mkfifo("pipe.png")
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(Path("pipe.png").read_bytes()))
    reader.start()
    pipe = dataclasses.replace(plan, run=dataclasses.replace(plan.run, out="pipe.png"))
    results.check_writable(pipe)
    draw(pipe)
    reader.join(5)
    assert got[0].endswith(b"IEND\xaeB`\x82") and got[0].startswith(b"\x89PNG") and Path("pipe.png").is_fifo()
    assert results.write_sheet(
        dataclasses.replace(plan.run, images=2), [[Path("pipe.png"), Path("link.png")]]
    )  # does not wait


def test_the_right_file_is_blamed(tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught, atomically(tmp_path / "x.json") as temporary:
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert caught.value.filename == str(tmp_path / "x.json") and not list(tmp_path.iterdir())


def test_what_was_drawn_is_never_lost(
    plan_of: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder that cannot be written any more: the picture goes into the run folder, or where temporary files go, and
    later prompts go on."""
    from xdit_core.worker.progress import Progress

    plan = plan_of("prompt=a", "prompt=b", "out=o")
    run_folder, spare = tmp_path / "run", tmp_path / "spare"
    run_folder.mkdir()
    spare.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(spare))
    beat = HeartbeatWriter(heartbeat_path(run_folder, 0))
    writer = Writer(plan, 0, Progress(None), beat, run_folder)
    Path("o").write_text("a file in the way")
    writer.output_done(picture("a", 0))
    Path("o").unlink()
    writer.output_done(picture("b", 1))
    assert (run_folder / "a-0.png").is_file() and Path("o/b-0.png").is_file()
    assert (
        f"o/a-0.png cannot be written: File exists; the result is in {run_folder / 'a-0.png'}\n"
        in capsys.readouterr().out
    )
    assert read_heartbeat(heartbeat_path(run_folder, 0)).written == 1  # type: ignore[union-attr]
    with pytest.raises(XditError, match=r"o/a-0\.png cannot be written: .* in .*run/a-0\.png; make room"):
        writer.check()
    full = Writer(plan, 0, Progress(None), beat, tmp_path / "gone" / "deep")
    (tmp_path / "gone").write_text("")
    (tmp_path / "o" / "a-0.png").mkdir()
    full.output_done(picture("a", 0))
    assert (spare / "a-0.png").is_file()


def test_every_file_is_listed(plan_of: Callable[..., Plan]) -> None:
    plan = plan_of("prompt=a", "prompt=b", "out=o")
    names = [str(p) for p in all_files(plan.run, targets(plan.run))]
    assert names == ["o/a-0.png", "o/a-0.json", "o/b-0.png", "o/b-0.json", "o/sheet.png"]


def test_text_files_of_users(tmp_path: Path) -> None:
    """Devices, pipes and odd bytes where a text file should be."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    (tmp_path / "bom").write_bytes(b"\xef\xbb\xbfa fox\n")
    assert read_text(tmp_path / "bom", "prompts=x", "give a text file") == "a fox\n"
    for path, part in (
        (Path("/dev/zero"), "more than 16 MiB"),
        (tmp_path / "pipe", "a pipe into which nobody writes"),
        (tmp_path / "bytes", "is not UTF-8 text"),
        (tmp_path, "Is a directory"),
        (tmp_path / ("x" * 300), "File name too long"),
        (Path("a\0b"), "null byte"),
    ):
        with pytest.raises(UsageError, match=part) as caught:
            read_text(path, "prompts=x", "give a text file")
        assert "give a text file" in str(caught.value)
    threading.Timer(0.2, lambda: (tmp_path / "pipe").write_text("late")).start()
    assert read_text(tmp_path / "pipe", "prompts=x", "") == "late"
