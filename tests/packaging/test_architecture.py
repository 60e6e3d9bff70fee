"""The folders are the architecture: what lies below knows nothing of what lies above it, and a folder is small enough
to be looked over."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"xdit_core": ROOT, "xdit_launcher": ROOT / "launcher"}
FOLDERS = ("xdit_core", "launcher", "plugins", "models", "benchmarks", "tests")
MOST_FILES = 12

pytestmark = pytest.mark.skipif(not (ROOT / "plugins").is_dir(), reason="needs the source tree")


def modules_in(root: Path, package: str) -> dict[str, ast.Module]:
    """The modules of a package by full name."""
    modules = {}
    for path in (root / package).rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        modules[name] = ast.parse(path.read_text(encoding="utf-8"))
    return modules


def imported(tree: ast.Module, known: set[str]) -> set[str]:
    """The modules among those known that a file imports: anywhere in it, and for types only as well."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names} & known
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:  # a name from a package may be a module of it
                inner = f"{node.module}.{alias.name}"
                names |= {inner if inner in known else node.module} & known
    return names


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules along one circle of imports, each of which imports the next; none if there is no circle."""
    settled: set[str] = set()

    def search(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name not in settled:
            for other in sorted(graph[name]):
                if along := search(other, [*way, name]):
                    return along
            settled.add(name)
        return []

    return next((along for name in sorted(graph) if (along := search(name, []))), [])


@pytest.mark.parametrize("package", PACKAGES)
def test_no_files_import_each_other_in_a_circle(package):
    """Type-only imports and those inside functions count: what is shared lies below those that share it."""
    trees = modules_in(PACKAGES[package], package)
    graph = {name: imported(tree, set(trees)) - {name} for name, tree in trees.items()}
    assert len(graph) > 20 and sum(map(len, graph.values())) > len(graph)  # something was found
    assert " -> ".join(circle(graph)) == ""


def test_a_circle_would_be_found():
    tree = ast.parse("if TYPE_CHECKING:\n    from a.b import c, D\ndef f():\n    import a.e\n")
    assert imported(tree, {"a.b", "a.b.c", "a.e", "a.x"}) == {"a.b", "a.b.c", "a.e"}
    assert circle({"a": {"b", "c"}, "b": set(), "c": {"d"}, "d": {"e", "b"}, "e": {"c"}}) == ["c", "d", "e", "c"]
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []


def folders() -> Iterator[Path]:
    """Every folder with Python files."""
    for name in FOLDERS:
        yield from sorted({path.parent for path in (ROOT / name).rglob("*.py")})


@pytest.mark.parametrize("folder", folders(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_folder_can_be_looked_over(folder):
    files = sorted(path.name for path in folder.glob("*.py"))
    assert len(files) <= MOST_FILES, (
        f"{folder.relative_to(ROOT)} has {len(files)} files; divide it by what they are about"
    )
