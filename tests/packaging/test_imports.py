"""Built-in plugins come in through the same door as others, and stay within the limits that this project set itself."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

import xdit_core

ROOT = Path(__file__).parents[2]
SOURCES = [p for folder in ("xdit_core", "plugins", "models", "launcher") for p in (ROOT / folder).rglob("*.py")]
EXTENSIONS = [p for p in SOURCES if p.is_relative_to(ROOT / "plugins") or p.is_relative_to(ROOT / "models")]
PUBLIC_MODULES = {"xdit_core.model_spec", "xdit_core.parallel.tokens", "xdit_core.testing.models"}

pytestmark = pytest.mark.skipif(not (ROOT / "plugins").is_dir(), reason="needs the source tree")


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((node.module, alias.name) for alias in node.names)


@pytest.mark.parametrize("path", EXTENSIONS, ids=lambda p: str(p.relative_to(ROOT)))
def test_plugins_use_public_names_only(path):
    own = path.relative_to(ROOT).parts[1]
    for module, name in imports(path):
        if module == "xdit_core":
            assert name in xdit_core.__all__, f"{name} is not public"
        elif module.startswith("xdit_core."):
            assert module in PUBLIC_MODULES, f"{module} is not public"
        elif module.startswith("xdit_"):
            strategies = {p.name for p in (ROOT / "plugins").iterdir()}
            assert module.split(".")[0] not in strategies - {own}, f"{own} knows {module}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_sizes(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= 500
    if path.is_relative_to(ROOT / "models") and path.name == "__init__.py":
        assert lines <= 60


@pytest.mark.parametrize("package", [p for p in (ROOT / "plugins").glob("xdit_*") if p.is_dir()], ids=lambda p: p.name)
def test_a_strategy_has_at_most_400_lines_in_all(package):
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in package.rglob("*.py")) <= 400


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_module_level_mutable_state(path):
    """Two engines with different plans work in one process: nothing may be remembered in a module."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(
            node.value, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp
        ):
            names = [ast.unparse(t) for t in (node.targets if isinstance(node, ast.Assign) else [node.target])]
            assert set(names) <= {"__all__", "_WITH_TORCH"}, f"{names} can be changed"


def test_every_package_is_an_entry_point():
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    packages = {
        p.name for folder in ("plugins", "models") for p in (ROOT / folder).iterdir() if (p / "__init__.py").exists()
    }
    assert {
        v.split(":")[0].split(".")[0] for g in ("xdit.plugins", "xdit.models") for v in groups[g].values()
    } == packages
    assert xdit_core.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_public_names_exist():
    for name in xdit_core.__all__:
        assert getattr(xdit_core, name) is not None
