"""A fixed budget of random bad inputs; the script tries more: python tests/helpers/launcher/bad_inputs.py 1000."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from helpers.launcher.bad_inputs import good_plan, odd_folder, run, wrong_with
from helpers.launcher.bad_words import Case


def test_bad_inputs_are_answered_with_sentences(tiny_sd3_folder: Path) -> None:
    finds: list[str] = []
    counts = run(150, 11, tiny_sd3_folder, good_plan(tiny_sd3_folder), finds.append)
    assert not finds, "\n".join(finds)
    assert counts["inputs"] == 150 and counts["exit 2"] > 50 and counts["exit 3"] > 5 and counts["exit 0"] > 5


def test_the_loop_would_see_it(tiny_sd3_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer with a traceback, control characters, a wrong code, or a changed file is a find."""
    from helpers.launcher import bad_inputs as bad

    with odd_folder(tiny_sd3_folder) as folder:
        for answer, part in (
            ((2, "", "Traceback (most recent call last)\n"), "a traceback"),
            ((2, "", "a\x1b[2Jb.\n"), "control characters"),
            ((2, "", ""), "no word"),
            ((70, "", "x\n"), "exit code 70"),
            ((2, "", "x" * 9000), "1 lines, 9000 characters"),
        ):
            monkeypatch.setattr(bad, "answer", lambda *_, given=answer: given)
            assert part in wrong_with(Case(["x"]), folder)
        monkeypatch.setattr(bad, "answer", lambda *_: (2, "", "no.\n") if not Path("made").touch() else (2, "", ""))
        assert "changed ['made']" in wrong_with(Case(["x"]), folder)
        assert os.getcwd() == str(folder)
