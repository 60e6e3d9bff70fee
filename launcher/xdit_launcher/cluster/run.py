"""The ranks of a plan over agents on several machines, however these were started: check, place, start, end."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from xdit_core.errors import UsageError
from xdit_core.filesystem import write_text
from xdit_core.records import join_words
from xdit_core.worker.rendezvous import COLUMNS_VARIABLE
from xdit_launcher.arguments import names_in
from xdit_launcher.backends.base import StartedRanks
from xdit_launcher.cluster import placement
from xdit_launcher.cluster.checks import check_hosts, variables_to_pass
from xdit_launcher.cluster.hosts import slots
from xdit_launcher.cluster.protocol import SILENCE
from xdit_launcher.cluster.rendezvous import meet
from xdit_launcher.node import root_cause
from xdit_launcher.node.processes import log_path
from xdit_launcher.node.root_cause import RankStatus, RankStatuses, RootCause
from xdit_launcher.node.watching import CAUSE_PATIENCE
from xdit_launcher.printing import say

if TYPE_CHECKING:
    from xdit_core.plan import Plan
    from xdit_launcher.cluster.fleet import Fleet


class FleetSettings(Protocol):
    """What the settings of a backend with a fleet say of the ranks."""

    @property
    def env(self) -> str:
        """Names of variables to pass on, with commas between them."""

    @property
    def rdzv(self) -> str | None:
        """``[HOST:]PORT`` at which the ranks meet, "" for any."""


@contextlib.contextmanager
def started_on(
    connect: Callable[[], Fleet], plan: Plan, folder: Path, settings: FleetSettings, serving: bool = False
) -> Iterator[StartedOnHosts]:
    """Start the ranks of a plan on a fleet; they and the fleet end with the context.

    Args:
        connect: makes the fleet.
        folder: the run folder here; the hosts make one of the same name.
        settings: of the backend.
        serving: the ranks answer requests instead of drawing what the plan says.

    Raises:
        UsageError: something would not work; says what, before any rank starts.
    """
    with connect() as fleet:
        variables = variables_to_pass(names_in(settings.env))
        write_text(folder / "plan.json", plan.to_json(), "runs")
        started = StartedOnHosts(fleet, plan, folder)
        try:
            with fleet.suspension.installed():
                facts, problems = check_hosts(fleet, plan)
                if problems:
                    raise UsageError(*problems)
                place_ranks(fleet, plan, facts)
                start_ranks(fleet, plan, folder, variables, settings.rdzv or None, facts, serving)
                yield started
        finally:
            started.stop()


class StartedOnHosts(StartedRanks):
    """The ranks of a plan on a fleet.

    Args:
        folder: the run folder here.
    """

    elsewhere = False

    def __init__(self, fleet: Fleet, plan: Plan, folder: Path) -> None:
        self.fleet, self.plan, self.folder, self._stopped = fleet, plan, folder, ""
        # a silent host is noticed only after a while
        self.cause_patience = CAUSE_PATIENCE + (SILENCE if len(fleet.hosts) > 1 else 0.0)

    def look(self) -> RankStatuses:
        """What is known of each rank, once the agents were heard for a moment."""
        return self.fleet.look()

    def statuses(self) -> RankStatuses:
        """What the agents have told of each rank."""
        return self.fleet.statuses_now()

    def absent(self, statuses: RankStatuses) -> str:
        """Nothing: every host has an agent."""
        return ""

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message to every rank, through its agent."""
        self.fleet.send_to_ranks(message)

    def messages(self, seconds: float) -> list[tuple[int, dict[str, Any]]]:
        """Messages of ranks that their agents have passed on."""
        return self.fleet.rank_messages(seconds)

    def wake(self) -> None:
        """Let `messages` return at once."""
        self.fleet.wake()

    def ask_for_stacks(self) -> None:
        """Let every rank write the stacks of its threads into its log."""
        self.fleet.ask("stacks", patience=3.0)

    def report(self, cause: RootCause) -> list[str]:
        """Lines about the cause of a failure; its log is copied to this machine."""
        shared_disk = log_path(self.folder, cause.rank).exists()
        cause = replace(cause, log=copy_log(self.fleet, cause.rank, self.folder) or cause.log)
        return root_cause.report_lines(cause, self.plan.world, together=shared_disk)

    def stop(self) -> str:
        """End every process on every host."""
        self._stopped = self._stopped or self.fleet.end()
        return self._stopped

    def finish(self) -> None:
        """Show the last words of rank 0."""
        self.stop()
        for _ in self.fleet.news(0.0):
            pass


def place_ranks(fleet: Fleet, plan: Plan, facts: Mapping[int, Any]) -> None:
    """Decide which ranks each host runs; say which axes then talk over the network, and which hosts stay idle.

    Raises:
        UsageError: the hosts have too few slots.
    """
    room = [slots(host, facts[i], plan.device) for i, host in enumerate(fleet.hosts)]
    fleet.ranks_of = placement.spread(plan.world, room, placement.together(plan))
    machines: dict[str, list[int]] = {}
    for host, ranks in zip(fleet.hosts, fleet.ranks_of, strict=True):
        machines.setdefault(host.name, []).extend(ranks)
    for line in placement.warnings(plan, list(machines.values())):
        say(line)
    if idle := [host.name for host, ranks in zip(fleet.hosts, fleet.ranks_of, strict=True) if not ranks]:
        have = "has" if len(idle) == 1 else "have"
        say(f"{join_words(idle)} {have} nothing to do in a plan of {plan.world} processes.")


def start_ranks(
    fleet: Fleet,
    plan: Plan,
    folder: Path,
    variables: Mapping[str, str],
    rdzv: str | None,
    facts: Mapping[int, Any],
    serving: bool = False,
) -> None:
    """Find an address at which all hosts reach the first one, and start the ranks.

    Args:
        variables: environment of the ranks of every host.
        rdzv: ``[HOST:]PORT`` at which to meet, None for any.
        facts: what the hosts said of themselves.
        serving: the ranks answer requests.

    Raises:
        UsageError: the hosts do not reach each other, or one cannot start its ranks.
    """
    used = [i for i, ranks in enumerate(fleet.ranks_of) if ranks]
    address, port = meet(fleet, used, rdzv, facts)
    fleet.statuses = {rank: RankStatus(fleet.hosts[i].name) for i in used for rank in fleet.ranks_of[i]}
    each = {
        i: {
            "ranks": [fleet.ranks_of[i].start, fleet.ranks_of[i].stop],
            "host": fleet.hosts[i].name,
            "devices": fleet.hosts[i].devices,
            "sharing": fleet.hosts[i].sharing,
        }
        for i in used
    }
    fleet.must(
        "start",
        each,
        plan=plan.to_json(),
        folder=str(folder),
        address=address,
        port=port,
        env={**variables, **terminal_variables()},
        serving=serving,
    )


def terminal_variables() -> dict[str, str]:
    """Variables that tell rank 0, which sees a pipe, how wide the terminal is; none if there is no terminal."""
    try:
        return {COLUMNS_VARIABLE: str(os.get_terminal_size(sys.stderr.fileno()).columns or 80)}
    except (OSError, ValueError):  # ValueError: there is no such stream
        return {}


def copy_log(fleet: Fleet, rank: int, folder: Path) -> str:
    """Copy the end of the log of a rank to this machine, unless both share a disk.

    Returns:
        Its path here, "" if it could not be copied.
    """
    path = log_path(folder, rank)
    if path.exists():
        return str(path)
    host = next(i for i, ranks in enumerate(fleet.ranks_of) if rank in ranks)
    answers, _ = fleet.ask("read_log", {host: {"rank": rank}}, patience=3.0, kind=str)
    if not answers.get(host):
        return ""
    try:
        path.write_text(answers[host], encoding="utf-8")
    except OSError:  # the report must come all the same
        return ""
    return str(path)
