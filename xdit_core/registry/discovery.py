"""Find what is installed: the entry points of all distributions, each read by itself, so that a damaged one harms no
other. Without torch."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

OWN = "xdit"  # the distribution whose names are its own
NAME = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True)
class InstalledPlugin:
    """An installed plugin that is not loaded yet.

    Args:
        name: of its entry point.
        group: of its entry point.
        distribution, version: where it comes from.
        entry: its entry point.
    """

    name: str
    group: str
    distribution: str
    version: str
    entry: metadata.EntryPoint


@dataclass(frozen=True)
class InstalledPlugins:
    """The entry points of a group.

    Args:
        plugins: those that can be used, by name; a name has several where distributions other than ours share it.
        notices: a line for each entry point that cannot be used, with its distribution and version.
    """

    plugins: dict[str, list[InstalledPlugin]]
    notices: tuple[str, ...]


def installed(group: str) -> InstalledPlugins:
    """The entry points of a group, by name; they are read again only where something was installed or removed."""
    return read_entry_points(group, tuple((folder, changed(folder)) for folder in sys.path))


def changed(folder: str) -> int:
    """When a folder of ``sys.path`` was changed, in nanoseconds; 0 if there is no such folder."""
    try:
        return os.stat(folder or ".").st_mtime_ns
    except OSError:
        return 0


@functools.lru_cache(maxsize=8)
def read_entry_points(group: str, folders: tuple[tuple[str, int], ...]) -> InstalledPlugins:
    """Read the entry points of a group.

    Args:
        folders: those of ``sys.path`` and when they were changed, by which the result is remembered.
    """
    plugins: dict[str, list[InstalledPlugin]] = {}
    notices: list[str] = []
    for distribution in metadata.distributions():
        if not mentions(distribution, group):  # nearly all: parsing their metadata would take long
            continue
        name, version = origin(distribution)
        try:
            entries = [e for e in distribution.entry_points if e.group == group]
        except Exception as error:  # whatever a damaged file makes the parser raise
            notices.append(
                f"{name} {version} has an entry_points.txt that cannot be read ({type(error).__name__}: {error})"
            )
            continue
        for entry in entries:
            plugin = InstalledPlugin(entry.name, group, name, version, entry)
            if not NAME.fullmatch(entry.name):
                notices.append(
                    f"{entry.name} of {name} {version} cannot be used: a name has lower-case letters, digits and _ and "
                    "begins with a letter"
                )
            elif not entry.pattern.match(entry.value):
                notices.append(f"{entry.name} of {name} {version} cannot be used: {entry.value!r} names no module")
            elif not any((f.distribution, f.entry.value) == (name, entry.value) for f in plugins.get(entry.name, ())):
                plugins.setdefault(entry.name, []).append(plugin)  # an editable install may list its metadata twice
    for key, items in plugins.items():
        ours = [item for item in items if item.distribution == OWN]
        if len(items) > 1:
            others = ", ".join(f"{item.distribution} {item.version}" for item in items if item not in ours)
            notices.append(
                f"{key} of {others} is ignored: {OWN} has one of that name"
                if ours
                else f"{key} cannot be used: {others} all have one; uninstall all but one of them"
            )
            plugins[key] = ours or items
    return InstalledPlugins(dict(sorted(plugins.items())), tuple(sorted(notices)))


def mentions(distribution: metadata.Distribution, group: str) -> bool:
    """The group's name occurs in a distribution's ``entry_points.txt``, or that file cannot be decoded."""
    try:
        return group in (distribution.read_text("entry_points.txt") or "")
    except UnicodeDecodeError:
        return True


def origin(distribution: metadata.Distribution) -> tuple[str, str]:
    """Name and version; ``?`` for what a damaged distribution does not say."""
    try:
        fields = distribution.metadata
        return str(fields["Name"] or "?"), str(fields["Version"] or "?")
    except Exception:  # there is no METADATA, or it is not text
        return "?", "?"


@contextlib.contextmanager
def contained() -> Iterator[None]:
    """Run code of a plugin so that it changes nothing outside.

    What it prints goes to standard error, and afterwards the working folder and the warning filters are as before.
    """
    try:
        folder = os.getcwd()
    except OSError:  # it was deleted
        folder = ""
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                if folder and os.getcwd() != folder:
                    os.chdir(folder)


__all__ = ["NAME", "OWN", "InstalledPlugin", "InstalledPlugins", "contained", "installed", "origin"]
