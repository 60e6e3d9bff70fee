"""What a newcomer writes at first, and what is said to it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from xdit_launcher.hints import loose_words


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--model", "emoji", "red heart"],
            "there is no option --model; settings are written without dashes: model=emoji.",
        ),
        (["--model=emoji", "red heart"], "settings are written without dashes: model=emoji."),
        (["model=emoji", "--seed", "5", "red heart"], "settings are written without dashes: seed=5."),
        (["model=emoji", "--negative", "a b", "red heart"], 'settings are written without dashes: negative="a b".'),
        (["model=emoji", "--usp.ulysses", "2", "red heart"], "settings are written without dashes: usp.ulysses=2."),
        (["model=emoji", "--pluginz", "usp", "x"], "there is no option --pluginz; did you mean --plugins?"),
        (["nosuch"], "there is no command 'nosuch'; commands are"),
        (["plugin"], "there is no command 'plugin'; did you mean plugins?"),
        (["model=emoji", "E=mc^2 poster"], "unknown setting E; known are"),
        (["model=emoji", "E=mc^2 poster"], 'To draw these words, write prompt="E=mc^2 poster".'),
    ],
)
def test_a_hint(say, words, said):
    result = say(*words)
    assert result.exit_code == 2
    assert said in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_settings_from_standard_input(tmp_path):
    command = [sys.executable, "-m", "xdit_launcher", "run", "--dry-run", "--config", "-"]
    text = "model: emoji\nsteps: 7\nprompt: rocket\ndevice: cpu\n"
    done = subprocess.run(command, input=text, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "7 steps" in done.stdout and "rocket" in done.stdout


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        (["red", "heart"], '2 prompts: red, heart; quote a prompt of several words: "red heart".'),
        (["red heart", "rocket"], ""),
        (["rocket"], ""),
        ([], ""),
    ],
)
def test_words_without_quotes(prompts, said):
    assert loose_words(prompts) == said


def test_prompts_from_standard_input(tmp_path):
    command = [sys.executable, "-m", "xdit_launcher", "run", "--dry-run", "model=emoji", "device=cpu", "prompts=-"]
    done = subprocess.run(
        command, input="rocket\n\n# not this\nred heart\n", capture_output=True, text=True, cwd=tmp_path, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "rocket" in done.stdout and "red heart" in done.stdout and "not this" not in done.stdout
    empty = subprocess.run(command, input="", capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert (empty.returncode, empty.stderr) == (
        2,
        "prompts=- but standard input is empty; write one prompt on each line.\n",
    )
