"""The console script, and ``python -m xdit_launcher``. Ctrl-C ends it quietly from its first line on."""

from __future__ import annotations

import os
import signal
import sys

INTERRUPTED = 130


def leave(number: int, frame: object) -> None:
    """Nothing has been started yet."""
    os._exit(INTERRUPTED)


def main() -> None:
    """Import the command line, which takes a moment, and run it."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # not under nohup and the like
        signal.signal(signal.SIGINT, leave)
    from xdit_core.worker.restart import with_docstrings

    with_docstrings("xdit_launcher", sys.argv[1:])
    from xdit_launcher import cli

    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, before)
    cli.main()


if __name__ == "__main__":
    main()
