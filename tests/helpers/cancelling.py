"""A request that is cancelled on its way, and what the engine gives afterwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from helpers.guidance import ASKED, SCHEDULES
from xdit_core import Engine, Observer, RequestCancelled
from xdit_core.testing.runs import plan_for

FEW = {"steps": 3, "output_type": "latent"}


class Steps(Observer):
    """Counts the steps of a rank over all calls of the pipeline."""

    def __init__(self) -> None:
        self.count = 0

    def step_done(self, step: int, steps: int) -> None:
        """Count."""
        self.count += 1


def cancelled_then_drawn(
    names: Sequence[str],
    folder: str,
    values: Mapping[str, Any],
    asked_at: int,
    prompts: Sequence[str],
    schedule: str = "",
) -> tuple[int, bool, bool]:
    """On every rank: cancel a request at the ``asked_at``-th checkpoint of the owner, then answer another one.

    Args:
        schedule: how guidance changes while the request runs, see ``helpers.guidance``.

    Returns:
        Steps made of the cancelled request, whether it ended early, and whether the latents of the next request equal
        those of a fresh engine bit for bit.
    """
    torch.set_num_threads(1)
    steps, asked = Steps(), 0

    def cancelled() -> bool:
        nonlocal asked
        asked += 1
        return asked > asked_at

    plan = plan_for(names, folder, values)
    engine, was_cancelled = Engine(plan, observer=steps), False
    call: dict[str, Any] = {}
    if schedule:
        engine.pipe._callback_tensor_inputs = ASKED
        call = {"callback_on_step_end": SCHEDULES[schedule], "callback_on_step_end_tensor_inputs": ASKED}
    try:
        engine.generate_all(prompts, cancelled=cancelled, call=call)
    except RequestCancelled:
        was_cancelled = True
    count = steps.count
    after = engine.generate("a blue bird", seed=7, **FEW).latents
    engine.close()
    fresh = Engine(plan)
    expected = fresh.generate("a blue bird", seed=7, **FEW).latents
    fresh.close()
    assert after is not None and expected is not None
    return count, was_cancelled, torch.equal(after, expected)
