"""The launcher of xdit: plans, processes on one machine or many, and `Gang`, which keeps them for requests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xdit_launcher.gang.gang import Gang

__all__ = ["Gang"]


def __getattr__(name: str) -> Any:
    """Import `Gang` when it is used, since the command line needs other modules."""
    if name == "Gang":
        from xdit_launcher.gang.gang import Gang

        return Gang
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
