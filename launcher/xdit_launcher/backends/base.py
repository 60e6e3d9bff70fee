"""What a backend is: a module that starts the processes of a run, and the settings that the user gave it.

A backend is a module or another object with

- ``start(plan, folder, settings) -> int``: run a plan and return the exit code; ``folder`` exists and takes the logs;
- ``Settings`` (optional): a dataclass as plugins have. Its fields are set with ``NAME.field=value``, or with an option
  ``--field`` where `xdit_launcher.backends.registry.OPTIONS` has one; every field has a default. Without this class
  ``settings`` is None;
- ``check(plan, settings)`` (optional): raise a `UsageError` for what can be known before anything is written or
  started;
- ``devices(settings) -> int | None`` (optional): how many processes suit the machines; None: as many as suit this one;
- ``show(plan, settings, words) -> list[str]`` (optional): lines that a dry run shows; ``words`` are those of the
  command line;
- ``connect(settings) -> Fleet`` (optional): agents on the machines, for ``doctor``, see `xdit_launcher.cluster.fleet`;
- ``document(plan, settings, words) -> str`` (optional): what a dry run prints instead of everything else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xdit_core.errors import UsageError

if TYPE_CHECKING:
    from xdit_core.plan import Plan
    from xdit_launcher.cluster.fleet import Fleet


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
