"""Start this process again where it cannot go on as it is. Without torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


def with_docstrings(module: str, arguments: Sequence[str]) -> None:
    """Under ``PYTHONOPTIMIZE=2`` or ``-OO`` there are no docstrings, and transformers cannot be imported; then start
    again without.

    The process id, open files and the environment stay.

    Args:
        module: what to run, as with ``python -m``.
    """
    if sys.flags.optimize < 2:
        return
    os.environ["PYTHONOPTIMIZE"] = "1"
    os.execv(sys.executable, [sys.executable, "-P", "-m", module, *arguments])
