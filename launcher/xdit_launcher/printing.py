"""Print lines of the launcher. In text of users, files and other machines, control characters are escaped."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import traceback
from collections.abc import Iterable

import click

from xdit_core.printable import printable

UNEXPECTED = 70  # exit code for a mistake in xdit, as in sysexits.h


def print_lines(lines: Iterable[str], err: bool = False) -> None:
    """Print some lines; control characters in them are escaped, so that each stays one line."""
    click.echo("\n".join(map(printable, lines)), err=err)


def say(text: str) -> None:
    """Print on stderr, in place of a progress line that may be there.

    A terminal that has been closed must not stop the work, so errors are ignored.
    """
    with contextlib.suppress(OSError):
        click.echo(("\r\x1b[K" if sys.stderr.isatty() else "") + printable(text, keep="\n"), err=True)


def report_unexpected(error: Exception) -> None:
    """Report an error that is a mistake in xdit, and where its traceback is."""
    text = "".join(traceback.format_exception(error))
    try:
        number, path = tempfile.mkstemp(prefix="xdit-", suffix=".traceback.txt")
        with os.fdopen(number, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{sys.argv}\n{sys.version}\n{text}")
    except OSError:
        click.echo(printable(text, keep="\n"), err=True)
        path = "the traceback above"
    message = " ".join(str(error).split())[:300]
    line = (
        f"unexpected: {type(error).__name__}{': ' if message else ''}{message}; this is a mistake in xdit or a plugin: "
        f"please report it with {path}."
    )
    print_lines([line], err=True)
