"""What the launcher prints: text of users, files and other machines without what would move the cursor or forge a
line."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Iterable

import click

from xdit_core.printable import printable

UNEXPECTED = 70  # exit code of what is a mistake of ours, as in sysexits.h


def print_lines(lines: Iterable[str], err: bool = False) -> None:
    """Some lines, each of which stays one."""
    click.echo("\n".join(map(printable, lines)), err=err)


def report_unexpected(error: Exception) -> None:
    """Say that something happened that should not, and where its traceback is."""
    text = "".join(traceback.format_exception(error))
    try:
        number, path = tempfile.mkstemp(prefix="xdit-", suffix=".traceback.txt")
        with os.fdopen(number, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{sys.argv}\n{sys.version}\n{text}")
    except OSError:
        click.echo(printable(text, keep="\n"), err=True)
        path = "the traceback above"
    what = " ".join(str(error).split())[:300]
    line = (
        f"unexpected: {type(error).__name__}{': ' if what else ''}{what}; this is a mistake in xdit or a plugin: "
        f"please report it with {path}."
    )
    print_lines([line], err=True)
