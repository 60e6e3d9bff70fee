"""A thread that ends jobs whose deadline has passed, and removes old results. Without torch."""

from __future__ import annotations

import sqlite3
import threading
import time

from xdit_launcher.serve.dispatcher import Dispatcher

PERIOD, PRUNING = 1.0, 60.0  # seconds between two looks at deadlines, and at old results
DAY, GIB = 86400.0, 2**30


class Housekeeping:
    """Looks after the jobs of a dispatcher.

    Args:
        dispatcher: whose jobs they are.
        period: seconds between two looks.
    """

    def __init__(self, dispatcher: Dispatcher, period: float = PERIOD) -> None:
        self._dispatcher, self._period = dispatcher, period
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="xdit-housekeeping", daemon=True)

    def __enter__(self) -> Housekeeping:
        self._thread.start()
        return self

    def __exit__(self, *details: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        pruned = 0.0
        while not self._stop.wait(self._period):
            try:
                self._dispatcher.expire()
                if time.monotonic() - pruned > PRUNING:
                    pruned = time.monotonic()
                    self._prune()
            except (OSError, sqlite3.Error) as error:
                self._dispatcher.log.unexpected("housekeeping failed", error)

    def _prune(self) -> None:
        limits = self._dispatcher.limits
        gone = self._dispatcher.store.prune(limits.results_gib * GIB, limits.results_days * DAY)
        if gone:
            self._dispatcher.log.write("old jobs removed", jobs=len(gone))
