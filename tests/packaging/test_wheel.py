"""The built wheel: only xdit_* at top level, and its entry points load."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    if not (ROOT / "pyproject.toml").exists():
        pytest.skip("needs the source tree")
    out = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(out),
        str(ROOT),
    ]
    subprocess.run(command, check=True)
    return next(out.glob("*.whl"))


def test_only_our_names_at_top_level(wheel):
    names = {n.split("/")[0] for n in zipfile.ZipFile(wheel).namelist()}
    roots = (ROOT / "plugins", ROOT / "models", ROOT / "launcher")
    packages = {p.name for root in roots for p in root.iterdir() if (p / "__init__.py").exists()}
    found = {n for n in names if not n.endswith(".dist-info")}
    assert found == packages | {"xdit_core"} and all(n.startswith("xdit_") for n in found)


def test_entry_points_load_from_the_wheel(wheel, tmp_path):
    target = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(target)
    code = (
        "import sys; from importlib.metadata import distribution, PathDistribution;from pathlib import Path;target = "
        f"{str(target)!r}; sys.path.insert(0, target);dist = "
        "PathDistribution(next(Path(target).glob('*.dist-info')));found = [e for e in dist.entry_points if "
        "e.group.startswith('xdit.') or e.group == 'console_scripts'];loaded = [e.load() for e in found];assert "
        "len(loaded) >= 6, found;assert all(m.__file__.startswith(target) for m in loaded if hasattr(m, '__file__')), "
        "loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_the_trained_weights_are_in_the_wheel(wheel):
    sizes = {
        i.filename: i.file_size
        for i in zipfile.ZipFile(wheel).infolist()
        if i.filename.startswith("xdit_emoji/pipeline/")
    }
    assert any(n.endswith("transformer/diffusion_pytorch_model.safetensors") for n in sizes)
    assert sum(sizes.values()) <= 25_000_000


def test_the_page_of_a_server_is_in_the_wheel(wheel):
    folder = "xdit_launcher/serve/page/"
    files = {name.removeprefix(folder) for name in zipfile.ZipFile(wheel).namelist() if name.startswith(folder)}
    assert {"index.html", "main.js", "style.css", "icon.svg"} <= files
    assert files == {path.name for path in (ROOT / "launcher" / folder).iterdir()}
