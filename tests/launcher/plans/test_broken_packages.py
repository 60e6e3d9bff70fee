"""A broken package is named in listings and changes nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from xdit_core import PluginError, Registry
from xdit_core.errors import XditError
from xdit_core.planning.planner import make_plan
from xdit_core.registry.discovery import installed
from xdit_core.registry.registry import STRATEGIES

HOOK = "from xdit_core import hookimpl\n"
STRATEGY = (
    HOOK
    + """from xdit_core import Declaration, Built
@hookimpl
def xdit_declare(settings, facts):
    {declare}
@hookimpl
def xdit_build(settings, rank):
    return Built()
"""
)
SPEC = HOOK + "from xdit_core import ModelSpec\n@hookimpl\ndef xdit_model():\n    {model}\n"

# kind of damage: (entry points, module, metadata, words that a listing says of it)
KINDS: dict[str, tuple[str, str, str | None, str]] = {
    "wrong-argument": (
        "[xdit.plugins]\nbad = bad\n",
        HOOK + "@hookimpl\ndef xdit_declare(seting, facts):\n    return None\n",
        "ok",
        "has a hook that does not fit",
    ),
    "misspelt-hook": (
        "[xdit.plugins]\nbad = bad\n",
        HOOK + "@hookimpl\ndef xdit_declair(settings, facts):\n    return None\n",
        "ok",
        "unknown hook 'xdit_declair'",
    ),
    "unmarked-hook": (
        "[xdit.plugins]\nbad = bad\n",
        STRATEGY.format(declare="return Declaration()") + "def xdit_check(settings, facts, plan):\n    return []\n",
        "ok",
        "a function xdit_check without @hookimpl",
    ),
    "raises-at-import": ("[xdit.plugins]\nbad = bad\n", "raise ValueError('oh')\n", "ok", "ValueError: oh"),
    "exits-at-import": ("[xdit.plugins]\nbad = bad\n", "import sys\nsys.exit(3)\n", "ok", "SystemExit: 3"),
    "no-module": ("[xdit.plugins]\nbad = bad_missing\n", "", "ok", "No module named 'bad_missing'"),
    "raises-in-declare": (
        "[xdit.plugins]\nbad = bad\n",
        STRATEGY.format(declare="raise KeyError('k')"),
        "ok",
        "failed in xdit_declare: KeyError: 'k'",
    ),
    "exits-in-declare": (
        "[xdit.plugins]\nbad = bad\n",
        STRATEGY.format(declare="raise SystemExit(5)"),
        "ok",
        "failed in xdit_declare: SystemExit: 5",
    ),
    "prints": (
        "[xdit.plugins]\nbad = bad\n",
        "print('loud')\n" + STRATEGY.format(declare="print('louder'); return Declaration()"),
        "ok",
        "",
    ),
    "changes-the-process": (
        "[xdit.plugins]\nbad = bad\n",
        "import os, warnings, logging\nos.chdir('/')\nwarnings.simplefilter('error')\nlogging.basicConfig(level=0)\n"
        + STRATEGY.format(declare="return Declaration()"),
        "ok",
        "",
    ),
    "name-with-dot": (
        "[xdit.plugins]\nbad.name = bad\n",
        "",
        "ok",
        "bad.name of xdit-bad 1.0 cannot be used: a name has lower-case letters",
    ),
    "upper-case": ("[xdit.plugins]\nBAD = bad\n", "", "ok", "BAD of xdit-bad 1.0 cannot be used"),
    "no-value": ("[xdit.plugins]\nbad = \n", "", "ok", "cannot be used: '' names no module"),
    "no-equals": ("[xdit.plugins]\nbad\n", "", "ok", "has an entry_points.txt that cannot be read"),
    "takes-our-name": (
        "[xdit.plugins]\nusp = bad\n",
        "raise ValueError('thief')\n",
        "ok",
        "usp of xdit-bad 1.0 is ignored: xdit has one of that name",
    ),
    "no-metadata": ("[xdit.plugins]\nbad = bad\n", "raise ValueError('oh')\n", None, "ValueError: oh"),
    "model-raises": (
        "[xdit.models]\nbad = bad\n",
        SPEC.format(model="raise ValueError('no')"),
        "ok",
        "failed in xdit_model: ValueError: no",
    ),
    "model-exits": (
        "[xdit.models]\nbad = bad\n",
        SPEC.format(model="raise SystemExit(2)"),
        "ok",
        "failed in xdit_model: SystemExit: 2",
    ),
    "model-of-another-kind": (
        "[xdit.models]\nbad = bad\n",
        SPEC.format(model="return {'name': 'bad'}"),
        "ok",
        "must return one ModelSpec",
    ),
    "model-takes-our-name": (
        "[xdit.models]\nsd3 = bad\n",
        "raise ValueError('thief')\n",
        "ok",
        "sd3 of xdit-bad 1.0 is ignored",
    ),
    "backend-raises": ("[xdit.launchers]\nbad = bad\n", "raise ValueError('no')\n", "ok", ""),
    "backend-exits": ("[xdit.launchers]\nbad = bad\n", "raise SystemExit(9)\n", "ok", ""),
    "backend-named-as-a-strategy": (
        "[xdit.launchers]\nusp = bad\n",
        "def start(plan, folder, settings):\n    return 0\n",
        "ok",
        "",
    ),
    "backend-takes-our-name": ("[xdit.launchers]\nlocal = bad\n", "raise ValueError('thief')\n", "ok", ""),
}


def commands(folder):
    """What users do, with healthy plugins: words, and whether it is a listing that may have a line more."""
    healthy = ["--plugins", "usp", "usp.ulysses=2", "device=cpu", f"model.path={folder}", "a fox", "--dry-run"]
    yield ["plugins"], True
    yield ["models"], True
    yield ["--help"], False
    yield ["plugins", "show", "usp"], False
    yield ["model=sd3", *healthy], False
    yield ["model=auto", "--json", *healthy], False
    yield ["model=sd3", "--hosts", "a:2", *healthy], False


@pytest.fixture(scope="module")
def baseline(tiny_sd3_folder):
    """What these say without a broken package; click's runner is enough, as nothing is started."""
    from click.testing import CliRunner

    from xdit_launcher.cli import cli

    return [(CliRunner().invoke(cli, words).stdout, words, listing) for words, listing in commands(tiny_sd3_folder)]


def install(kind, folder, monkeypatch):
    """Put the broken package onto the path; whether it has metadata, and what a listing says of it."""
    entries, module, metadata, said = KINDS[kind]
    describe(folder / "xdit_bad-1.0.dist-info", "xdit-bad" if metadata else "", entries)
    (folder / "bad.py").write_text(module)
    monkeypatch.syspath_prepend(str(folder))
    return metadata, said


def describe(info, name, entries):
    """Metadata of version 1.0 of a distribution; none without a name."""
    info.mkdir()
    (info / "entry_points.txt").write_text(entries)
    if name:
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")


@pytest.mark.parametrize("kind", KINDS)
def test_nobody_else_is_harmed(kind, baseline, tmp_path, monkeypatch):
    from click.testing import CliRunner

    from xdit_launcher.cli import cli

    _, said = install(kind, tmp_path, monkeypatch)
    before = os.getcwd()
    for want, words, listing in baseline:
        sys.modules.pop("bad", None)
        result = CliRunner().invoke(cli, words)
        assert result.exit_code == 0, (words, result.output)
        lines = result.stdout.splitlines()
        if listing:
            more = [line for line in lines if line not in want.splitlines()]
            assert [line for line in lines if line not in more] == want.splitlines()
            assert len(more) <= 1
            if more and more[0].startswith("broken"):
                assert said and said in more[0], more
        else:
            assert result.stdout == want
    sys.modules.pop("bad", None)
    assert os.getcwd() == before
    if said:
        both = CliRunner().invoke(cli, ["plugins"]).stdout + CliRunner().invoke(cli, ["models"]).stdout
        assert said in both and "Traceback" not in both


@pytest.mark.parametrize(
    "kind", [k for k, v in KINDS.items() if v[3] and v[0].startswith("[xdit.plugins]\nbad = bad\n")]
)
def test_selecting_it_is_a_sentence(kind, tmp_path, monkeypatch):
    metadata, said = install(kind, tmp_path, monkeypatch)
    sys.modules.pop("bad", None)
    with pytest.raises(PluginError) as refused:
        make_plan(["bad"], {"model": "emoji", "device": "cpu"})
    sys.modules.pop("bad", None)
    assert said in str(refused.value) and (metadata is None or "xdit-bad 1.0" in str(refused.value))


def test_what_a_plugin_prints_does_not_reach_the_json_of_a_plan(tmp_path):
    """In a real process, where standard output is a file."""
    describe(tmp_path / "xdit_bad-1.0.dist-info", "xdit-bad", "[xdit.plugins]\nbad = bad\n")
    (tmp_path / "bad.py").write_text(KINDS["prints"][1])
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)
    words = ["--plugins", "bad", "model=emoji", "device=cpu", "--dry-run", "--json", "rocket"]
    command = [sys.executable, "-m", "xdit_launcher", *words]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, timeout=60, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["plugins"] == {"bad": ["xdit-bad", "1.0"]}
    assert "loud" in done.stderr


def test_a_name_that_two_strangers_have(tmp_path, monkeypatch):
    for i in (1, 2):
        describe(tmp_path / f"xdit_bad{i}-1.0.dist-info", f"xdit-bad{i}", f"[xdit.plugins]\nbad = bad{i}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(XditError, match="two distributions register a plugin 'bad'"):
        Registry().select(["bad"])


def test_entry_points_that_are_no_text(tmp_path, monkeypatch):
    describe(tmp_path / "xdit_bad-1.0.dist-info", "xdit-bad", "")
    (tmp_path / "xdit_bad-1.0.dist-info" / "entry_points.txt").write_bytes(b"\xff\xfe[xdit.plugins]")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = installed(STRATEGIES)
    assert "usp" in found.plugins
    assert any("xdit-bad 1.0 has an entry_points.txt that cannot be read" in notice for notice in found.notices)
