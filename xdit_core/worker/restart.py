"""Start this process again with other options of Python. Without torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


def with_docstrings(module: str, arguments: Sequence[str]) -> None:
    """Start again without ``-OO`` or ``PYTHONOPTIMIZE=2``, since transformers cannot be imported without docstrings.

    Process id, open files and environment stay the same.

    Args:
        module: what to run, as with ``python -m``.
    """
    if sys.flags.optimize < 2:
        return
    os.environ.pop("PYTHONOPTIMIZE", None)  # not 1 either: nothing is compiled for that, and torch takes long
    os.execv(sys.executable, [sys.executable, "-P", "-m", module, *arguments])
