"""Folders and files of users: checked before a run, written whole or not at all. Without torch."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import secrets
import select
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from xdit_core.errors import UsageError

MOST_TEXT = 16 * 2**20  # bytes of a text file that a user may give
LONGEST_NAME, LONGEST_PATH = 255, 4096  # bytes, where the file system does not say
READER = 10.0  # seconds to wait for somebody who reads from a named pipe
WRITER = 1.0  # seconds to wait for somebody who writes into one


def user_path(text: str, setting: str) -> Path:
    """A path as a user writes it, with ``~`` and ``~name`` replaced.

    Args:
        setting: what gave it, as it is written: ``out=`` or ``--config``.

    Raises:
        UsageError: there is no such user, or the text can be no path: a zero byte, a name too long.
    """
    if "\0" in text:
        raise UsageError(f"{setting}{text} holds a zero byte, which no path can have; write another path.")
    try:
        path = Path(text).expanduser()
    except RuntimeError as error:
        who = Path(text).parts[0]
        raise UsageError(f"{setting}{text}: the home folder of {who} is not known; write the whole path.") from error
    check_names([path], f"{setting}{text}")  # Python has no answer to whether such a file is there, but an error
    return path


def read_text(path: Path, setting: str, fix: str, most: int = MOST_TEXT) -> str:
    """A text file that a user names, or standard input for ``-``; a pipe such as ``<(command)`` is read to its end.

    Args:
        setting: what names it, as it is written, with the path: ``prompts=x.txt``.
        fix: what to give instead, such as ``give a text file``.
        most: bytes that it may have.

    Raises:
        UsageError: it cannot be read, is no text, or is too large.
    """
    try:
        if str(path) == "-" and sys.stdin is not None:
            data: bytes | None = sys.stdin.buffer.read(most + 1)
        else:  # a named pipe without its other end would be waited for without a word
            with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0) as file:
                data = read_some(file, most + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UsageError(f"{setting} cannot be read: {reason}; {fix}.") from error
    if data is None:
        raise UsageError(f"{setting} is a pipe into which nobody writes; {fix}.")
    if len(data) > most:
        raise UsageError(f"{setting} holds more than {most // 2**20} MiB; {fix}.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{setting} is not UTF-8 text ({error}); {fix}, saved as UTF-8.") from error


def read_some(file: io.FileIO, most: int) -> bytes | None:
    """At most so many bytes of a file that was opened without waiting; None for a pipe that nobody writes into.

    A writer that is there may take its time.
    """
    data, pipe = b"", stat.S_ISFIFO(os.fstat(file.fileno()).st_mode)
    end = time.monotonic() + WRITER
    while len(data) < most:
        piece = file.read(min(2**20, most - len(data)))
        if piece:
            data += piece
        elif piece is None:  # nothing yet
            select.select([file], [], [])
        elif data or not pipe:
            break
        elif time.monotonic() > end:
            return None
        else:
            time.sleep(0.05)
    return data


def check_names(paths: Iterable[Path], given: str) -> None:
    """No name is longer than its file system takes: found before the work and not after it.

    Args:
        given: the setting and its value, for the message.

    Raises:
        UsageError: one is too long, with its number of bytes.
    """
    limits: dict[Path, int] = {}
    for path in paths:
        folder = nearest(path.parent)
        if folder not in limits:
            limits[folder] = limit(folder, "PC_NAME_MAX", LONGEST_NAME)
        most = limits[folder]
        for name in path.parts:
            if len(os.fsencode(name)) > most:
                raise UsageError(
                    f"{given}: the name {name[:20]}... has {len(os.fsencode(name))} bytes and {folder} takes {most}; "
                    "choose a shorter one."
                )
        if len(os.fsencode(path.absolute())) >= LONGEST_PATH:
            raise UsageError(f"{given}: the path is longer than {LONGEST_PATH} bytes; choose a shorter one.")


def limit(folder: Path, name: str, usual: int) -> int:
    """A limit of a file system."""
    try:
        limit = os.pathconf(folder, name)
    except (OSError, ValueError, AttributeError):
        return usual
    return limit if limit > 0 else usual


def nearest(folder: Path) -> Path:
    """The folder, or the first one above it that is there."""
    return next((p for p in (folder, *folder.parents) if os.path.lexists(p)), Path())


def check_folder(folder: Path, given: str, setting: str) -> None:
    """Files can be made in a folder, or where it will be made; nothing is left behind.

    Args:
        given: the setting and its value, ``setting`` its name alone.

    Raises:
        UsageError: it is not possible.
    """
    there = nearest(folder)
    with explained(there, given, setting):
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(there))
        probe = there / f".xdit-{secrets.token_hex(4)}"
        probe.touch()
        probe.unlink()


def make_folder(folder: Path, setting: str, value: str) -> None:
    """Make a folder if it is not there and write a file in it for a moment.

    Raises:
        UsageError: it is not possible; names the setting.
    """
    given = f"{setting}={value}"
    check_names([folder], given)
    with explained(folder, given, setting):
        folder.mkdir(parents=True, exist_ok=True)
    check_folder(folder, given, setting)


@contextlib.contextmanager
def explained(folder: Path, given: str, setting: str) -> Iterator[None]:
    """Errors of the file system as sentences."""
    try:
        yield
    except (FileExistsError, NotADirectoryError) as error:
        blocking = next((p for p in (folder, *folder.parents) if os.path.lexists(p) and not p.is_dir()), folder)
        what = (
            "a link that leads nowhere" if blocking.is_symlink() and not blocking.exists() else "a file, not a folder"
        )
        raise UsageError(
            f"{given} cannot be written: {blocking} is {what}; choose another place with {setting}=."
        ) from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UsageError(
            f"{given} cannot be written: {folder}: {reason}; choose another place with {setting}=."
        ) from error


def behind_links(path: Path) -> Path:
    """The file that a path leads to, there or not.

    Raises:
        OSError: its links lead in a circle.
    """
    target = Path(os.path.realpath(path)) if path.is_symlink() else path
    if target.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return target


def is_special(path: Path) -> bool:
    """A pipe, a device or a socket: bytes go into it, and it must not be replaced."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


@contextlib.contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """A temporary path that becomes ``path`` if the block goes through: nobody ever reads half a file.

    A link stays and the file it leads to is replaced; a pipe or a device gets the bytes.

    Raises:
        OSError: with ``path`` as its file, whatever name was written to.
    """
    with blaming(path), contextlib.ExitStack() as stack:
        target = behind_links(path)
        if is_special(target):
            temporary = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="xdit-"))) / path.name
            yield temporary
            pour(temporary, target)
            return
        temporary = target.with_name(f".xdit-{secrets.token_hex(6)}")  # short: it must fit wherever ``path`` does
        stack.callback(discard, temporary)
        yield temporary
        os.replace(temporary, target)


@contextlib.contextmanager
def blaming(path: Path) -> Iterator[None]:
    """Errors of the file system name this file, whatever name was written to."""
    try:
        yield
    except OSError as error:
        with contextlib.suppress(AttributeError):  # of libraries, which have errors of their own
            error.filename, error.filename2 = str(path), None
        raise


def discard(path: Path) -> None:
    """Delete a file, if it is there and can be."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def pour(source: Path, target: Path) -> None:
    """The bytes of a file into a pipe or a device.

    Raises:
        OSError: nobody reads from the pipe.
    """
    end = time.monotonic() + READER
    while True:
        try:
            fd = os.open(target, os.O_WRONLY | os.O_NONBLOCK)
            break
        except OSError as error:
            if error.errno != errno.ENXIO or time.monotonic() > end:
                raise
        time.sleep(0.05)
    os.set_blocking(fd, True)
    with os.fdopen(fd, "wb") as out, source.open("rb") as file:
        shutil.copyfileobj(file, out)


def write_text(path: Path, text: str, setting: str) -> None:
    """A file of the run folder.

    Args:
        setting: with which another folder can be chosen.

    Raises:
        UsageError: it cannot be written.
    """
    try:
        with atomically(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"{path} cannot be written: {error.strerror}; choose another place with {setting}=."
        ) from error
