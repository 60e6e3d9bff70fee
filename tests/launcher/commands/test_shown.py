"""What is shown holds no control characters of users or files, and mistakes of ours are told in a sentence."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from click.testing import Result

from helpers import counting
from xdit_core.errors import PlanRefused, UsageError
from xdit_core.printable import columns, cut, printable
from xdit_core.records import Problem
from xdit_core.registry.registry import STRATEGIES, Registry
from xdit_core.worker.progress import Progress
from xdit_launcher.commands import matrix, pages
from xdit_launcher.node import root_cause
from xdit_launcher.node.root_cause import RootCause
from xdit_launcher.printing import say as shout

Say = Callable[..., Result]
FORGED = "x\x1b[2J\r\nrank 0 of 2 on host failed at: nothing"


def test_printable() -> None:
    assert printable("a\x1b[2Jb\nc\td\x9b\u2028") == r"a\x1b[2Jb\nc\td\x9b\u2028"
    assert printable("abc\u202egnp.exe \ud800") == r"abc\u202egnp.exe \ud800"
    plain = "Füchse 狐 🦊 👩\u200d🚀 \u2764\ufe0f नमस्ते \\x1b"
    assert printable(plain) == plain and printable("a\nb\x07", keep="\n") == "a\nb\\x07"


def test_cut_by_columns() -> None:
    assert cut("狐狐狐", 5) == "狐狐" and cut("abc", 3) == "abc" and cut("e\u0301e\u0301", 1) == "e\u0301"
    assert sum(map(columns, "🦊é")) == 3


def test_errors_stay_sentences() -> None:
    assert str(UsageError(f"out={FORGED}: no")).count("\n") == 0
    assert str(UsageError("one", "two\nthree")) == "one\ntwo\\nthree"
    assert str(PlanRefused([Problem("a\nb", "c"), Problem("d", "e")])) == "a\\nb; c.\nd; e."


def test_nothing_of_a_prompt_moves_the_cursor(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    terminal.fileno = lambda: 1  # type: ignore[method-assign]
    monkeypatch.setattr(os, "get_terminal_size", lambda fd: os.terminal_size((40, 24)))
    progress = Progress(terminal)
    progress.begin(FORGED)
    progress.step_done(1, 2)
    progress._title = "狐" * 40
    progress.step_done(2, 2)
    for line in terminal.getvalue().split("\r\x1b[K"):
        assert printable(line) == line and sum(map(columns, line)) < 40
    found = RootCause(0, FORGED, FORGED, FORGED, 1, FORGED)
    assert len(root_cause.report_lines(found, 1)) == 3 and all(
        printable(line) == line for line in root_cause.report_lines(found, 1)
    )
    shout(FORGED)
    assert capsys.readouterr().err == "x\\x1b[2J\\r\nrank 0 of 2 on host failed at: nothing\n"


@pytest.mark.parametrize(
    "words",
    [
        [FORGED, "--dry-run"],
        ["a", f"out=o/{FORGED}.png", "--dry-run"],
        [f"steps={FORGED}"],
        [f"{FORGED}=1"],
        ["--dry-run", f"--{FORGED}"],
    ],
)
def test_a_command_line_with_control_characters(say: Say, tiny: tuple[str, ...], words: list[str]) -> None:
    output = say(*[w for w in tiny if not w.startswith("steps")], *words).output
    assert printable(output, keep="\n") == output
    assert not any(line.startswith("rank 0 of 2") for line in output.splitlines())


def test_a_mistake_of_ours_is_told_in_a_sentence(say: Say, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*_: object, **__: object) -> None:
        raise AssertionError("two\nlines")

    monkeypatch.setattr("xdit_core.planning.planner.make_plan", broken)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    result = say("a fox")
    assert result.exit_code == 70 and result.stdout == ""
    assert result.stderr.startswith(
        "unexpected: AssertionError: two lines; this is a mistake in xdit or a plugin: please report it with "
    )
    (file,) = tmp_path.glob("xdit-*.traceback.txt")
    assert str(file) in result.stderr and "Traceback" in file.read_text()


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (
            ["out=~nosuchuser/x"],
            "out=~nosuchuser/x: the home folder of ~nosuchuser is not known; write the whole path.",
        ),
        (["runs=~nosuchuser/x"], "runs=~nosuchuser/x: the home folder"),
        (["lora=~nosuchuser/x"], "lora=~nosuchuser/x: the home folder"),
        (["prompts=/dev/zero"], "prompts=/dev/zero holds more than 16 MiB; give a text file."),
        (["prompts=pipe"], "prompts=pipe is a pipe into which nobody writes"),
        (["out=" + "x" * 300], "has 300 bytes and "),
        (["out=" + "x" * 300 + ".png"], "has 304 bytes and "),
        (["runs=" + "x" * 300], "has 300 bytes and "),
        (["lora=" + "x" * 300], "has 300 bytes and "),
        (["prompts=" + "x" * 300], "has 300 bytes and "),
        (["call.joint_attention_kwargs=" + "[" * 100000], "is not a JSON object, as StableDiffusion3Pipeline takes it"),
        (["--config", "deep.yaml"], "--config deep.yaml nests too deep"),
        (["--config", "/dev/zero"], "--config /dev/zero holds more than 1 MiB; give a YAML file."),
        (["--config", "~nosuchuser/x"], "--config ~nosuchuser/x: the home folder"),
        (["--hostfile", "/dev/zero"], "the hostfile /dev/zero holds more than"),
        (["--hostfile", "twice"], "twice line 1 gives an option twice"),
        (["--hosts", "a:" + "9" * 5000], "is not a number of slots"),
        (["--nnodes", "1", "--node-rank", "0", "--rdzv", "a:" + "9" * 5000], "is not HOST:PORT"),
        (
            ["--on", "slurm", "slurm.options=--x\n#SBATCH --y"],
            "slurm.options=--x\\n#SBATCH --y holds control characters",
        ),
        (["--on", "slurm", "slurm.options='"], "slurm.options=' cannot be read (No closing quotation)"),
    ],
)
def test_odd_words_and_files(say: Say, tiny: tuple[str, ...], words: list[str], part: str) -> None:
    os.mkfifo("pipe")
    Path("deep.yaml").write_text("[" * 5000)
    Path("twice").write_bytes(b"\xef\xbb\xbfa slots=1 slots=2\n")
    result = say(*tiny, "a fox", *words)
    assert result.exit_code in (2, 3) and part in result.stderr and result.stdout == "", result.output
    assert len(result.stderr.splitlines()) == 1 and "Traceback" not in result.stderr


def test_a_hostfile_with_a_byte_order_mark(tmp_path: Path) -> None:
    from xdit_launcher.cluster.host_file import read_hostfile

    (tmp_path / "hosts").write_bytes(b"\xef\xbb\xbfa slots=1\n")
    assert [h.name for h in read_hostfile(tmp_path / "hosts")] == ["a"]


def test_a_matrix_of_no_model(say: Say) -> None:
    result = say("plugins", "--matrix", "--model", "nope")
    assert result.exit_code == 2 and result.stderr.startswith("unknown model 'nope'") and result.stdout == ""


def test_a_matrix_leaves_out_plugins_that_only_observe(monkeypatch: pytest.MonkeyPatch) -> None:
    class Installed(Registry):
        def __init__(self, extra: Mapping[str, object] | None = None) -> None:
            super().__init__({**(extra or {}), "counting": counting})

        def names(self, group: str) -> list[str]:
            return ["cfg", "counting"] if group == STRATEGIES else super().names(group)

    monkeypatch.setattr(matrix, "Registry", Installed)
    monkeypatch.setattr(pages, "Registry", Installed)
    values = {"model": "emoji", "device": "cpu"}
    assert next(matrix.lines(values)).split() == ["|", "|", "cfg", "|"]
    assert [pair["plugins"] for pair in pages.pairs(values)] == [["cfg"]]


def test_interrupted_while_it_starts(tmp_path: Path) -> None:
    """Ctrl-C during the first imports, which here take long."""
    (tmp_path / "click").mkdir()
    (tmp_path / "click" / "__init__.py").write_text(
        "import pathlib, time\npathlib.Path('begun').touch()\ntime.sleep(20)\n"
    )
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    process = subprocess.Popen(
        [sys.executable, "-m", "xdit_launcher", "plugins"], cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True
    )
    end = time.monotonic() + 20
    while not (tmp_path / "begun").exists() and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130 and process.stderr is not None and process.stderr.read() == ""


def test_without_docstrings(tiny: tuple[str, ...], tmp_path: Path) -> None:
    """Libraries need docstrings, so that a launcher or a worker that has none starts again; the picture is drawn."""
    words = [sys.executable, "-m", "xdit_launcher", *tiny, "a fox"]
    done = subprocess.run(
        words, cwd=tmp_path, env={**os.environ, "PYTHONOPTIMIZE": "2"}, capture_output=True, text=True
    )
    assert done.returncode == 0 and (tmp_path / "out.png").is_file(), done.stderr
    plan = next(tmp_path.glob("runs/*/plan.json"))
    assert json.loads(plan.read_text())["model"] == "sd3"
    (tmp_path / "out.png").unlink()
    worker = [sys.executable, "-OO", "-m", "xdit_core.worker", str(plan)]
    done = subprocess.run(worker, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "out.png").is_file(), done.stderr


def test_what_click_says_holds_no_control_characters(say: Say) -> None:
    for words in (["plugins", "show", "usp", FORGED], ["models", FORGED], [f"--{FORGED}"], ["models", f"--{FORGED}"]):
        result = say(*words)
        assert result.exit_code == 2 and printable(result.output, keep="\n") == result.output
        assert not any(line.startswith("rank 0 of 2") for line in result.output.splitlines())
