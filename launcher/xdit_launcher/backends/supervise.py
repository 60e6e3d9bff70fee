"""Run a plan: start its ranks, watch them, report how they ended."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from xdit_launcher.backends.base import StartedRanks
from xdit_launcher.node.root_cause import RankStatuses, results_lines
from xdit_launcher.node.signals import INTERRUPTED, ignore_interrupts, signals_interrupt
from xdit_launcher.node.watching import Watch, watch
from xdit_launcher.printing import say

if TYPE_CHECKING:
    from xdit_core.plan import Plan


def supervise(plan: Plan, ranks: AbstractContextManager[StartedRanks]) -> int:
    """Run a plan to its end.

    Args:
        ranks: starts the ranks of the plan when it is entered, and ends them when it is left.

    Returns:
        0, the exit code of the rank that is the cause of a failure, or 130 after Ctrl-C and SIGTERM.

    Raises:
        UsageError: the ranks cannot be started.
    """
    ended = "every process has ended"
    statuses: RankStatuses = {}
    try:
        with signals_interrupt(), ranks as started:
            try:
                patience, stacks = started.cause_patience, started.ask_for_stacks
                watcher = Watch(plan.run.timeout, patience, stacks, started.elsewhere, started.absent)
                cause = watch(started.look, watcher)
            except KeyboardInterrupt:
                ignore_interrupts()
                ended = started.stop()
                statuses = started.statuses()
                raise
            if cause is None:
                started.finish()
                return 0
            report = started.report(cause)
            started.stop()
            say("\n".join([*report, *results_lines(started.statuses(), plan)]))
            return cause.code
    except KeyboardInterrupt:
        ignore_interrupts()
        say("\n".join([f"interrupted; {ended}.", *results_lines(statuses, plan)]))
        return INTERRUPTED
