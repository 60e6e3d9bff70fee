"""Which plans can answer a single call of the denoiser."""

from __future__ import annotations

from xdit_core.errors import UsageError
from xdit_core.plan import Plan
from xdit_core.records import join_words


def check_single_call(plan: Plan) -> None:
    """Refuse a plan whose strategies work on more than one call of the denoiser.

    Raises:
        UsageError: names them.
    """
    if names := sorted({name for point in ("request", "forward") for _, name in plan.wraps.get(point, ())}):
        raise UsageError(
            f"{join_words(names)} cannot divide a single call of the denoiser; use strategies that can, such as usp "
            "and tp."
        )
