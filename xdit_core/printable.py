"""Text of users, files and other machines as it may be shown: no control characters, and cut by columns. Without
torch."""

from __future__ import annotations

import unicodedata

HIDDEN = frozenset(("Cc", "Cs", "Zl", "Zp"))  # categories of Unicode that no terminal shows as a character
# what turns the direction of the text around, so that it reads as something else
TURNING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def printable(text: str, keep: str = "") -> str:
    """A text in which what would move the cursor, clear the screen or begin a line is written as an escape such as
    ``\\x1b``.

    Args:
        keep: control characters that stay, such as a newline.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        c if c in keep or not (unicodedata.category(c) in HIDDEN or c in TURNING) else escaped(c) for c in text
    )


def escaped(character: str) -> str:
    """A character in the words of Python: ``\\n``, ``\\x1b``, ``\\u202e``."""
    return character.encode(
        "unicode_escape" if not "\ud800" <= character <= "\udfff" else "ascii", "backslashreplace"
    ).decode()


def columns(character: str) -> int:
    """How many columns of a terminal a character takes."""
    if unicodedata.combining(character) or unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def cut(text: str, width: int) -> str:
    """As much of a text as fits into so many columns."""
    used = 0
    for i, character in enumerate(text):
        used += columns(character)
        if used > width:
            return text[:i]
    return text
