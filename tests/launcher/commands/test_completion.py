"""Completion, by a real bash."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
eval "$(_XDIT_LAUNCH_COMPLETE=bash_source xdit-launch)"
compopt() { echo "NOSPACE"; }
COMP_LINE="$1" COMP_POINT=${#1}
_xdit_launch_completion xdit-launch
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A folder with ``xdit-launch``, as it is installed."""
    folder = tmp_path_factory.mktemp("bin")
    program = folder / "xdit-launch"
    program.write_text(f"#!{sys.executable}\nfrom xdit_launcher.cli import main\nmain()\n")
    program.chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash")
@pytest.mark.parametrize(
    ("line", "reply"),
    [
        ("xdit-launch ste", ["NOSPACE", "steps="]),
        ("xdit-launch run ste", ["NOSPACE", "steps="]),
        ("xdit-launch model=em", ["emoji"]),
        ("xdit-launch run model=em", ["emoji"]),
        ("xdit-launch dtype=", ["float32", "bfloat16", "float16"]),
        ("xdit-launch doc", ["doctor"]),
        ("xdit-launch --plugins usp,pi", ["usp,pipefusion"]),
        ("xdit-launch run --plugins usp usp.u", ["NOSPACE", "usp.ulysses="]),
        ("xdit-launch --plugins usp usp.r", ["NOSPACE", "usp.ring="]),
        ("xdit-launch plugins show pa", ["parallel_vae"]),
        ("xdit-launch models show pixart_", ["pixart_alpha", "pixart_sigma"]),
        ("xdit-launch nothing=", [""]),
    ],
)
def test_bash(path, line, reply):
    done = subprocess.run(
        ["bash", "-c", SCRIPT, "bash", line],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PATH": path},
    )
    assert done.stdout.split("\n")[:-1] == reply, done.stderr


@pytest.mark.parametrize("words", [["plugins"], ["plugins", "show", "usp"], ["models"], ["models", "show", "emoji"]])
def test_listings_as_json(say, words):
    shown, data = say(*words), say(*words, "--json")
    assert (shown.exit_code, data.exit_code) == (0, 0), data.output
    content = json.loads(data.stdout)
    names = [item["name"] for item in (content if isinstance(content, list) else [content])]
    assert all(name in shown.stdout for name in names)


def test_the_page_of_a_model(say, tiny_sd3_folder):
    page = json.loads(say("models", "show", "sd3", f"model.path={tiny_sd3_folder}", "--json").stdout)
    assert page["strategies"]["usp"] == "" and page["strategies"]["parallel_vae"] == ""
    assert "frames" not in page["settings"] and "negative" in page["settings"]
    assert json.loads(say("models", "show", "sd3", "--json").stdout)["strategies"] == {}
    assert "DIR" in say("models", "show", "sd3").stdout


def test_an_unknown_model_has_no_page(say):
    result = say("models", "show", "emojy")
    assert result.exit_code == 2
    assert "did you mean emoji?" in result.stderr


def test_every_command_lists_the_settings(say):
    for command in ("run", "verify", "doctor"):
        assert "model.path=" in say(command, "--help").stdout
    assert Path("runs").exists() is False
