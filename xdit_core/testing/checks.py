"""A plan compared with its oracle: diffusers, or for a displaced plan the same schedule in one process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from xdit_core.plan import Plan
from xdit_core.planning.signatures import argument_names
from xdit_core.registry.registry import Registry
from xdit_core.testing.pool import Pool
from xdit_core.testing.runs import diffusers_latents, generate, plan_for

REQUEST = ("steps", "guidance", "negative", "height", "width", "frames", "images", "max_sequence_length")


def assert_close(latents: torch.Tensor, oracle: torch.Tensor, within: float = 1e-5) -> None:
    """Two results agree in float32.

    Args:
        within: largest difference, in parts of the oracle's largest value or of 1, whichever is larger.

    Raises:
        AssertionError: they differ by more, in shape or in type, or the oracle is not finite.
    """
    assert latents.shape == oracle.shape and latents.dtype == oracle.dtype, f"{latents.shape} is not {oracle.shape}"
    assert torch.isfinite(oracle).all(), "the oracle is not finite"
    torch.testing.assert_close(latents, oracle, rtol=0, atol=within * max(1.0, oracle.abs().max().item()))


def oracle_of(plan: Plan, folder: str | Path, settings: Mapping[str, Any], prompt: str = "a red fox") -> torch.Tensor:
    """The latents that a plan must give.

    Args:
        plan: of which plugins that are displaced are replaced by their reference in one process.
        settings: from which the plan was made.
    """
    if plan.displaced:
        request = {
            key: value for key, value in settings.items() if "." not in key or key.startswith(("call.", "model."))
        }
        return generate(list(plan.displaced), str(folder), {**request, **plan.reference}, prompt)[0]
    spec, _ = Registry().model(plan.model)
    names = argument_names(spec)
    values = {names[name]: getattr(plan.run, name) for name in REQUEST if names.get(name)}
    arguments = {name: value for name, value in values.items() if value is not None}
    return diffusers_latents(str(folder), prompt, plan.run.scheduler, **arguments, **plan.call)


def check_plan(
    pool: Pool,
    folder: str | Path,
    plugins: Sequence[str],
    settings: Mapping[str, Any] | None = None,
    *,
    world: int,
    within: float = 1e-5,
    nccl_rules: bool = False,
) -> list[dict[str, int]]:
    """Run a plan and compare the latents of every rank with the oracle.

    Args:
        folder: of a tiny Stable Diffusion 3, or of the model that ``settings`` name.
        world: number of ranks that the plan must have.
        nccl_rules: fail where NCCL would, see ``xdit_core.testing.nccl_rules``.
        within: as in ``assert_close``; of a plugin that approximates, its own bound if that is larger.

    Returns:
        The bytes that each rank sent, by axis.

    Raises:
        AssertionError: the latents differ, or the plan has another number of ranks.
    """
    chosen = dict(settings or {})
    plan = plan_for(plugins, str(folder), chosen)
    assert plan.world == world, f"the plan has {plan.world} ranks, not {world}"
    oracle = oracle_of(plan, folder, chosen)
    results = pool.run(generate, list(plugins), str(folder), chosen, world=world, nccl_rules=nccl_rules)
    for latents, _ in results:
        assert_close(latents, oracle, max(within, plan.bound))
    return [sent for _, sent in results]
