"""Every scheduler of diffusers, unmodified, steps patch tensors exactly as it steps plain ones."""

from __future__ import annotations

import inspect
import warnings
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch

from xdit_core.parallel.patch_tensor import PatchTensor
from xdit_core.parallel.placements import LocalPlacement

diffusers = pytest.importorskip("diffusers")
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: E402

SHAPE, CUTS, STEPS = (1, 4, 11, 6), (0, 4, 5, 9, 11), 7
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
KARRAS = {"use_karras_sigmas": True}
V = {"prediction_type": "v_prediction"}
THRESHOLD = {"thresholding": True}

# What is tried besides the defaults.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "DPMSolverMultistepScheduler": [
        *({"algorithm_type": a, "solver_order": o} for a in ("dpmsolver++", "sde-dpmsolver++") for o in (1, 2, 3)),
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
        {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"},
        {"solver_type": "heun"},
        {**KARRAS, "euler_at_final": True},
        FLOW,
        {**FLOW, "algorithm_type": "sde-dpmsolver++"},
        THRESHOLD,
    ],
    "DPMSolverMultistepInverseScheduler": [KARRAS, {"solver_order": 3}],  # its sde variants are nan from the start
    "DPMSolverSinglestepScheduler": [
        *({"algorithm_type": a} for a in ("dpmsolver++", "sde-dpmsolver++")),
        {"solver_order": 1},
        {"solver_order": 3, "lower_order_final": True},
        KARRAS,
        FLOW,
    ],
    "UniPCMultistepScheduler": [{"solver_order": 1}, {"solver_order": 3}, {"solver_type": "bh1"}, FLOW, KARRAS],
    "DEISMultistepScheduler": [{"solver_order": 1}, {"solver_order": 3}, FLOW, KARRAS],
    "SASolverScheduler": [{"predictor_order": 1, "corrector_order": 1}, {"algorithm_type": "data_prediction"}, FLOW],
    "EulerDiscreteScheduler": [V, KARRAS, {"timestep_spacing": "trailing"}],
    "EulerAncestralDiscreteScheduler": [V],
    "HeunDiscreteScheduler": [V, KARRAS],
    "KDPM2DiscreteScheduler": [V, KARRAS],
    "DDIMScheduler": [V, {"clip_sample": False}, {"prediction_type": "sample"}, THRESHOLD],
    "DDPMScheduler": [V, {"variance_type": "fixed_large"}, {"variance_type": "learned_range"}, THRESHOLD],
    "PNDMScheduler": [V, {"skip_prk_steps": True}],
    "FlowMatchEulerDiscreteScheduler": [{"shift": 3.0}, {"stochastic_sampling": True}, KARRAS, {"invert_sigmas": True}],
    "EDMDPMSolverMultistepScheduler": [{"algorithm_type": "sde-dpmsolver++"}, {"solver_order": 3}],
    "EDMEulerScheduler": [V],
    "LCMScheduler": [V],
    "TCDScheduler": [V],
}
# Arguments of step that change what it does.
STEP: dict[str, list[dict[str, Any]]] = {
    "DDIMScheduler": [{"eta": 0.5}, {"eta": 0.5, "use_clipped_model_output": True}],
    "DDIMParallelScheduler": [{"eta": 0.5}],
    "CogVideoXDDIMScheduler": [{"eta": 0.5}],
    "EulerDiscreteScheduler": [{"s_churn": 0.5}],
    "EDMEulerScheduler": [{"s_churn": 0.5}],
    "FlowMatchHeunDiscreteScheduler": [{"s_churn": 0.5}],
}
# Not for continuous latents that a denoiser of rows predicts, or step is another kind of function. Exactly these
# classes cannot run here with plain tensors either.
UNFIT = {
    "AmusedScheduler": "steps tokens",
    "BlockRefinementScheduler": "steps tokens",
    "DiscreteDDIMScheduler": "steps tokens",
    "EntropyBoundScheduler": "steps tokens",
    "VQDiffusionScheduler": "steps tokens",
    "HeliosDMDScheduler": "steps the stages of a pyramid of sizes",
    "HeliosScheduler": "steps the stages of a pyramid of sizes",
    "KarrasVeScheduler": "step takes two sigmas",
    "PiflowScheduler": "takes a grid of predictions",
    "RFD4ProteinaScheduler": "steps atoms",
    "ScoreSdeVeScheduler": "has no step",
    "ScoreSdeVpScheduler": "has no step",
}
TWO_STEPS = {"SCMScheduler", "ConsistencyDecoderScheduler"}  # take no other number
# Which schedulers leave the fast path, and through which operations.
THRESHOLDED = {"aten.view.default"}  # a quantile of the whole picture, after a reshape to [B, C * H * W]
MATERIALIZING: dict[str, set[str]] = {
    "DDIMScheduler": THRESHOLDED,
    "DDPMScheduler": THRESHOLDED,
    "DPMSolverMultistepScheduler": THRESHOLDED,
    "SASolverScheduler": {"aten.add_.Tensor"},  # adds in place to zeros_like of latents that are plain at first
    "UniPCMultistepScheduler": {"aten.view.default"},  # an einsum over stacked history, of order 3 and above
}


def schedulers() -> list[type[Any]]:
    """All classes of ``diffusers.schedulers`` that can be imported here."""
    found = (getattr(diffusers.schedulers, name) for name in dir(diffusers.schedulers))
    return [c for c in found if inspect.isclass(c) and issubclass(c, SchedulerMixin) and c is not SchedulerMixin]


def cases() -> list[Any]:
    """Each class with each of its variants."""
    result = []
    for cls in schedulers():
        name = cls.__name__
        for config, step in [
            ({}, {}),
            *((c, {}) for c in VARIANTS.get(name, [])),
            *(({}, s) for s in STEP.get(name, [])),
        ]:
            label = ",".join(f"{k}={v}" for k, v in {**config, **step}.items())
            result.append(pytest.param(cls, config, step, id=f"{name}[{label}]" if label else name))
    return result


def denoise(x: torch.Tensor, t: torch.Tensor, channels: int, placement: LocalPlacement | None) -> torch.Tensor:
    """Stands in for a transformer: exact arithmetic on each row, another one for each; by patches if placed."""
    weights = torch.linspace(-1, 1, SHAPE[1] * SHAPE[2] * SHAPE[3]).view(SHAPE[1:])
    level = torch.as_tensor(t, dtype=torch.float32).reshape(-1)[0] / 1000

    def rows(start: int, stop: int) -> torch.Tensor:
        part = x.rows(start, stop) if isinstance(x, PatchTensor) else x[..., start:stop, :]
        out = part / (1 + part.abs()) * weights[:, start:stop] + level * 0.1
        return out if channels == 1 else torch.cat([out, out * 0.5], 1)

    if placement is None:
        return rows(0, SHAPE[2])
    pieces = [rows(a, b) for a, b in pairwise(CUTS)]
    shape = (x.shape[0], x.shape[1] * channels, *x.shape[2:])
    return PatchTensor.make(
        [lambda p=p: p for p in pieces],
        shape=shape,
        dim=-2,
        bounds=CUTS,
        dtype=x.dtype,
        device=x.device,
        placement=placement,
    )


def run(
    cls: type[Any], config: dict[str, Any], step: dict[str, Any], placement: LocalPlacement | None
) -> list[torch.Tensor]:
    """The denoising loop of a pipeline with guidance; the latents after each step."""
    torch.manual_seed(5)  # some schedulers draw from the global generator
    generator = torch.Generator().manual_seed(1)
    scheduler = cls(**config)
    scheduler.set_timesteps(2 if cls.__name__ in TWO_STEPS else STEPS)
    latents = torch.randn(SHAPE, generator=generator) * float(getattr(scheduler, "init_noise_sigma", 1.0))
    accepted = inspect.signature(scheduler.step).parameters
    extra: dict[str, Any] = dict(step)
    if "generator" in accepted:
        extra["generator"] = generator
    if cls.__name__ == "RePaintScheduler":
        extra |= {"original_image": torch.ones(SHAPE), "mask": (torch.randn(SHAPE) > 0).float()}
    channels = 2 if config.get("variance_type") == "learned_range" else 1
    history, old = [], None
    timesteps = list(scheduler.timesteps)
    if cls.__name__ in ("DDPMWuerstchenScheduler", "SCMScheduler"):  # the last is where they end
        timesteps = [t.reshape(1) for t in timesteps[:-1]]
    for i, t in enumerate(timesteps):
        inputs = torch.cat([latents] * 2)
        if hasattr(scheduler, "scale_model_input"):
            inputs = scheduler.scale_model_input(inputs, t)
        uncond, cond = denoise(inputs, t, channels, placement).chunk(2)
        pred = uncond + 2.5 * (cond - uncond)
        if cls.__name__ == "CogVideoXDPMScheduler":
            back = timesteps[i - 1] if i else None
            latents, old = scheduler.step(pred, old, t, back, latents, **extra, return_dict=False)
        else:
            latents = scheduler.step(pred, t, latents, **extra, return_dict=False)[0]
        latents = latents.to(torch.float32)
        history.append(latents)
    return history


Both = Callable[..., tuple[list[Any], list[Any], LocalPlacement]]


@pytest.fixture(scope="module")
def both() -> Both:
    """What a case gives, plain and lazy; each is run once."""
    known: dict[str, tuple[list[Any], list[Any], LocalPlacement]] = {}

    def find(*case: Any) -> tuple[list[Any], list[Any], LocalPlacement]:
        if str(case) not in known:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                placement = LocalPlacement()
                known[str(case)] = run(*case, None), run(*case, placement), placement
        return known[str(case)]

    return find


@pytest.mark.parametrize(("cls", "config", "step"), [c for c in cases() if c.values[0].__name__ not in UNFIT])
def test_scheduler(cls: type[Any], config: dict[str, Any], step: dict[str, Any], both: Both) -> None:
    plain, lazy, placement = both(cls, config, step)
    assert all(x.isfinite().all() for x in plain[:-1])  # UniPC of type bh1 ends in nan, serially too
    assert set(placement.materialized) <= MATERIALIZING.get(cls.__name__, set())
    for wanted, got in zip(plain, lazy, strict=True):
        assert got.shape == wanted.shape and got.dtype == wanted.dtype
        got = got.materialize() if isinstance(got, PatchTensor) else got
        assert torch.equal(got.isnan(), wanted.isnan()) and torch.equal(got.nan_to_num(), wanted.nan_to_num())


def test_which_schedulers_are_unfit() -> None:
    """The table above is exact: no class in it can run with plain tensors, and every other class can."""
    unfit = set()
    for cls in schedulers():
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                run(cls, {}, {}, None)
        except Exception:
            unfit.add(cls.__name__)
    assert unfit == set(UNFIT)


def test_which_schedulers_materialize(both: Both) -> None:
    """The table above is exact: the operations of all variants of a class together."""
    seen: dict[str, Counter[str]] = {}
    ran = set()
    for case in cases():
        name = case.values[0].__name__
        if name in UNFIT:
            continue
        _, _, placement = both(*case.values)
        ran.add(name)
        if placement.materialized:
            seen.setdefault(name, Counter()).update(placement.materialized)
    print(f"{len(ran)} schedulers ran; materialized by: {seen}")
    assert {name: set(ops) for name, ops in seen.items()} == MATERIALIZING
    assert len(ran) >= 30
