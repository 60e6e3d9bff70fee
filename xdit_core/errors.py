"""Every error that a user can meet: a sentence that says what is wrong and what to do, and an exit code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from xdit_core.printable import printable

if TYPE_CHECKING:
    from xdit_core.records import Problem

LONGEST = 2000  # characters of a sentence


class XditError(Exception):
    """Base class. ``str(error)`` is for the user to read; no traceback is needed to act on it.

    Args:
        sentences: each becomes one line, whatever the user's words in it hold.
    """

    exit_code = 1

    def __init__(self, *sentences: object) -> None:
        super().__init__(*map(str, sentences))

    def __str__(self) -> str:
        return "\n".join(shortened(printable(sentence)) for sentence in self.args)


def shortened(sentence: str) -> str:
    """A sentence with a very long value of the user in it keeps its beginning, and its end, which says what to do."""
    return sentence if len(sentence) <= LONGEST else f"{sentence[: LONGEST // 2]} ... {sentence[-LONGEST // 2 :]}"


class UsageError(XditError):
    """The command line or a setting is wrong."""

    exit_code = 2


class PlanRefused(XditError):
    """The chosen plugins, model and degrees do not fit together. Lists every problem at once.

    Args:
        problems: what is wrong, each with its fix.
    """

    exit_code = 3

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__(*problems)
        self.problems = tuple(problems)


class PluginError(XditError):
    """A plugin could not be loaded or one of its hooks failed; names the plugin and its distribution."""

    exit_code = 2


class PluginFailed(PluginError):
    """Code of a plugin or an adapter failed while a plan was made or a run was under way; names it, its distribution
    and version."""

    exit_code = 1


class ModelError(XditError):
    """The checkpoint is missing, unreadable or not what the adapter expects."""

    exit_code = 2


class GuardError(XditError):
    """An attention call did not go through the engine, so the result would have been wrong."""


class UnsupportedCall(XditError):
    """The pipeline called the denoiser in a way that the engine cannot compute."""


class RequestCancelled(XditError):
    """A request was ended early because somebody asked for it.

    Attributes:
        outputs: what was finished before.
    """

    outputs: Sequence[object] = ()

    def __init__(self, sentence: str = "the request was cancelled.") -> None:
        super().__init__(sentence)


class LockstepError(XditError):
    """Ranks that must enter the same collective have entered different ones, or only some have entered one."""


class LazyError(XditError):
    """A patch tensor was used in a way that would give wrong values."""
