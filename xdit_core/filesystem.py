"""Folders and files of users: checked before a run, written whole or not at all. Without torch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from xdit_core.errors import UsageError


def make_folder(folder: Path, setting: str, value: str) -> None:
    """Make a folder if it is not there and write a file in it for a moment.

    Raises:
        UsageError: it is not possible; names the setting.
    """
    probe = folder / f".xdit-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except (FileExistsError, NotADirectoryError) as error:
        blocking = next((p for p in (folder, *folder.parents) if p.exists() and not p.is_dir()), folder)
        raise UsageError(
            f"{setting}={value} cannot be written: {blocking} is a file, not a folder; choose another place with {setting}=."
        ) from error
    except OSError as error:
        raise UsageError(
            f"{setting}={value} cannot be written: {folder}: {error.strerror}; choose another place with {setting}=."
        ) from error


@contextlib.contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """A temporary path that becomes ``path`` if the block goes through: nobody ever reads half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
