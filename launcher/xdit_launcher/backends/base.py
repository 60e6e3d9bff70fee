"""What a backend is: a module that starts the processes of a run, and the settings that the user gave it.

A backend is a module or another object with

- ``start(plan, folder, settings) -> int``: run a plan and return the exit code; ``folder`` exists and takes the logs;
- ``ranks(plan, folder, settings, serving) -> context of StartedRanks`` (optional): start the ranks of a plan, and end
  them when the context is left. With ``serving`` they answer requests instead of drawing what the plan says; a backend
  without this function cannot keep ranks for requests;
- ``Settings`` (optional): a dataclass as plugins have. Its fields are set with ``NAME.field=value``, or with an option
  ``--field`` where `xdit_launcher.backends.registry.OPTIONS` has one; every field has a default. Without this class
  ``settings`` is None;
- ``check(plan, settings)`` (optional): raise a `UsageError` for what can be known before anything is written or
  started;
- ``beside(plan, settings, number, count) -> Settings`` (optional): the settings with which the ranks of one of several
  gangs of the same plan are started, so that they do not get in each other's way; raise a `UsageError` if there is no
  room for so many. A backend without this function has one gang at a time;
- ``devices(settings) -> int | None`` (optional): how many processes suit the machines; None: as many as suit this one;
- ``show(plan, settings, words) -> list[str]`` (optional): lines that a dry run shows; ``words`` are those of the
  command line;
- ``connect(settings) -> Fleet`` (optional): agents on the machines, for ``doctor``, see `xdit_launcher.cluster.fleet`;
- ``document(plan, settings, words) -> str`` (optional): what a dry run prints instead of everything else;
- ``service(plan, settings, words, replicas, data) -> str`` (optional): what ``serve`` prints instead of serving;
  ``replicas`` are the least and the most number of gangs, ``data`` is the folder of jobs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from xdit_core.errors import UsageError
from xdit_launcher.node.root_cause import RankStatuses, RootCause

if TYPE_CHECKING:
    from xdit_core.plan import Plan
    from xdit_launcher.cluster.fleet import Fleet


class StartedRanks(Protocol):
    """The ranks of a plan, from their start to their end.

    Attributes:
        cause_patience: seconds to wait for the cause when so far only ranks have failed that lost their peers.
        elsewhere: other launchers run ranks that are not seen from here.
    """

    cause_patience: float
    elsewhere: bool

    def look(self) -> RankStatuses:
        """What is known of each rank, after waiting some milliseconds."""

    def statuses(self) -> RankStatuses:
        """What is known of each rank, without waiting."""

    def absent(self, statuses: RankStatuses) -> str:
        """A sentence about machines that have not joined, "" if all have."""

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message to every rank; only ranks that answer requests take any."""

    def messages(self, seconds: float) -> list[tuple[int, dict[str, Any]]]:
        """Messages of ranks, each with the rank; wait so many seconds if there is none."""

    def wake(self) -> None:
        """Let `messages` return at once; may be called from any thread."""

    def ask_for_stacks(self) -> None:
        """Let every rank write the stacks of its threads into its log."""

    def report(self, cause: RootCause) -> list[str]:
        """Lines about the cause of a failure; called while the ranks can still be asked for their logs."""

    def stop(self) -> str:
        """End every process, and return what became of them in words."""

    def finish(self) -> None:
        """All ranks have ended well: take what they still have to say."""


@dataclass(frozen=True)
class Backend:
    """A backend with its settings.

    Args:
        name: of its entry point.
        module: what the entry point names.
        settings: an instance of the module's ``Settings``, None if it has none.
    """

    name: str
    module: Any
    settings: Any

    def devices(self) -> int | None:
        """How many processes suit the machines, None for as many as suit this one."""
        function = getattr(self.module, "devices", None)
        return function(self.settings) if function else None

    def check(self, plan: Plan) -> None:
        """Refuse what can be known before anything is written.

        Raises:
            UsageError: the plan cannot run there.
        """
        function = getattr(self.module, "check", None)
        if function:
            function(plan, self.settings)

    def start(self, plan: Plan, folder: Path) -> int:
        """Run a plan and return the exit code."""
        code: int = self.module.start(plan, folder, self.settings)
        return code

    def ranks(self, plan: Plan, folder: Path) -> AbstractContextManager[StartedRanks]:
        """Start ranks that answer requests; they end with the context.

        Raises:
            UsageError: the backend cannot keep ranks.
        """
        function = getattr(self.module, "ranks", None)
        if function is None:
            raise UsageError(
                f"the backend {self.name} runs a plan and cannot keep its ranks for requests; use another one with "
                "--on, such as local or ssh."
            )
        context: AbstractContextManager[StartedRanks] = function(plan, folder, self.settings, serving=True)
        return context

    def beside(self, plan: Plan, number: int, count: int) -> Backend:
        """The backend of one of several gangs of the same plan.

        Args:
            number: counts them from 0.
            count: how many there are.

        Raises:
            UsageError: the backend cannot start several, or has no room for so many.
        """
        if count == 1:
            return self
        function = getattr(self.module, "beside", None)
        if function is None:
            raise UsageError(
                f"the backend {self.name} starts one gang; leave out --replicas, or use --on local or --on ray."
            )
        return replace(self, settings=function(plan, self.settings, number, count))

    def connect(self) -> Fleet:
        """Agents on the machines.

        Raises:
            UsageError: the backend has none.
        """
        function = getattr(self.module, "connect", None)
        if function is None:
            raise UsageError(f"the backend {self.name} has no agents that could look at the machines; use --on ssh.")
        fleet: Fleet = function(self.settings)
        return fleet

    def show(self, plan: Plan, words: Sequence[str]) -> list[str]:
        """Lines that a dry run shows."""
        function = getattr(self.module, "show", None)
        return list(function(plan, self.settings, words)) if function else []

    def document(self, plan: Plan, words: Sequence[str]) -> str:
        """What a dry run prints instead of the plan, "" if nothing."""
        function = getattr(self.module, "document", None)
        return function(plan, self.settings, words) if function else ""

    def service(self, plan: Plan, words: Sequence[str], replicas: tuple[int, int], data: str) -> str:
        """What ``serve`` prints instead of serving, "" if it serves."""
        function = getattr(self.module, "service", None)
        return function(plan, self.settings, words, replicas, data) if function else ""
