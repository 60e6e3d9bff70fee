"""What a client can ask of the served model, and how the ranks share the work: enough to build a form and a drawing."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter

from xdit_core.checkpoints.model_facts import MOST_PIXELS, describing
from xdit_core.model_spec import ModelSpec
from xdit_core.outputs.metadata import FPS
from xdit_core.plan import Plan
from xdit_core.planning.degrees import processes
from xdit_core.records import Axis
from xdit_core.settings import MOST_SCALE
from xdit_launcher.commands.show import exactness_line
from xdit_launcher.serve.api.common import ACaller, AServer
from xdit_launcher.serve.api.native import MOST_PREVIEWS, JobRequest
from xdit_launcher.serve.limits import MOST_SEED, ServeSettings
from xdit_launcher.serve.media import FORMATS

LORA_HELP = "scale of a LoRA, 0 leaves it out"
SOME_GUIDANCE = 5.0  # with which a model that knows guidance uses it
router = APIRouter(prefix="/v1", tags=["jobs"])


@dataclass(frozen=True)
class Setting:
    """A field of a job.

    Args:
        name: in the body of ``POST /v1/jobs``; ``call.NAME`` is an item of ``call``, ``lora.NAME`` one of ``lora``.
        title: a word or two for a person.
        kind: ``text``, ``integer``, ``number``, ``choice``, or ``seeds``: one integer, or one for each picture.
        default: what the server takes if it is left out; None if that is chosen for each job.
        minimum, maximum: the smallest and largest value, or the most characters of a text; None if there is no limit.
        step: values are ``minimum`` and whole steps above it; None if any value will do.
        choices: the values of a choice.
        help: what it is.
        main: most people want to see it.
    """

    name: str
    title: str
    kind: str
    default: Any = None
    minimum: float | None = None
    maximum: float | None = None
    step: float | None = None
    choices: tuple[str, ...] = ()
    help: str = ""
    main: bool = False


@router.get("/settings")
async def settings(server: AServer, caller: ACaller) -> dict[str, Any]:
    """What a job may set: the settings that this model takes, with defaults and limits."""
    plan, spec, limits, loras = server.check.plan, server.check.spec, server.check.limits, server.check.loras
    return {
        "model": server.model,
        "video": server.video,
        "subject": spec.request.subject,
        "example": spec.request.example,
        "prompt_characters": limits.prompt,
        "pixels": limits.pixels,
        "settings": [dataclasses.asdict(setting) for setting in settings_of(plan, spec, limits, loras)],
    }


@router.get("/plan")
async def drawn(server: AServer, caller: ACaller) -> dict[str, Any]:
    """How the ranks share the work of a job of the default size."""
    return plan_body(server.check.plan)


def settings_of(plan: Plan, spec: ModelSpec, limits: ServeSettings, loras: Iterable[str] = ()) -> Iterator[Setting]:
    """The fields of a job that the model of a plan takes, in the order of a form."""
    for setting in (
        *size_settings(plan, spec, limits),
        *drawing_settings(plan, spec, limits),
        *file_settings(plan),
        *call_settings(plan, limits),
        *(
            Setting(f"lora.{name}", name, "number", 0, -MOST_SCALE, MOST_SCALE, help=LORA_HELP)
            for name in sorted(loras)
        ),
        Setting("previews", "Previews", "integer", 0, 0, MOST_PREVIEWS, 1),
        Setting("priority", "Priority", "integer", 0, -10, 10, 1),
    ):
        field = JobRequest.model_fields.get(setting.name)
        yield setting if field is None else dataclasses.replace(setting, help=field.description or "")


def drawing_settings(plan: Plan, spec: ModelSpec, limits: ServeSettings) -> Iterator[Setting]:
    """How it is drawn: steps, guidance, number of pictures, seed, the negative prompt."""
    run, takes = plan.run, spec.request.takes
    yield Setting("steps", "Steps", "integer", run.steps, 1, limits.steps, 1, main=True)
    if takes("guidance") and run.guidance is not None:
        yield Setting("guidance", "Guidance", "number", run.guidance, 0, None, 0.1, main=True)
    title = "Videos" if plan.facts.video else "Pictures"
    yield Setting("images", title, "integer", run.images, 1, limits.images, 1, main=True)
    seed = list(run.seed) if "seed" in plan.values else None
    yield Setting("seed", "Seed", "seeds", seed, 0, MOST_SEED - limits.images, 1, main=True)
    if takes("negative") and can_use_negative(plan, spec, limits):
        yield Setting("negative", "Negative prompt", "text", run.negative or "", 0, limits.prompt, main=True)
    if takes("max_sequence_length") and run.max_sequence_length != 0:
        yield Setting("max_sequence_length", "Text tokens", "integer", run.max_sequence_length, 0, None, 1)


def can_use_negative(plan: Plan, spec: ModelSpec, limits: ServeSettings) -> bool:
    """Whether a negative prompt can change what is drawn: some guidance that clients may set has two branches."""
    uses_cfg = spec.request.uses_cfg
    if uses_cfg is None:
        return spec.request.takes("guidance")
    asked = {**dataclasses.asdict(plan.run), **plan.call, **dict.fromkeys(limits.call_names, SOME_GUIDANCE)}
    guidance = max(plan.run.guidance or 0.0, SOME_GUIDANCE)
    with describing(spec):
        return bool(uses_cfg({**asked, "negative": "x", "guidance": guidance}))


def size_settings(plan: Plan, spec: ModelSpec, limits: ServeSettings) -> Iterator[Setting]:
    """Width, height and frames."""
    run, facts, unit = plan.run, plan.facts, plan.facts.pixels_per_token
    most = min(MOST_PIXELS, limits.pixels // unit) // unit * unit  # if the other side is one token
    for name, value in (("width", run.width), ("height", run.height)):
        if spec.request.takes(name):
            yield Setting(name, name.capitalize(), "integer", value, unit, most, unit, main=True)
    if facts.video:
        last = (limits.frames - 1) // facts.frame_step * facts.frame_step + 1
        yield Setting("frames", "Frames", "integer", run.frames or 1, 1, last, facts.frame_step, main=True)


def file_settings(plan: Plan) -> Iterator[Setting]:
    """What kind of file a result is."""
    yield Setting("output_type", "Result", "choice", plan.run.output_type, choices=("image", "latent"))
    if not plan.facts.video:
        yield Setting("format", "Format", "choice", "png", choices=tuple(FORMATS))
        yield Setting("compression", "Quality", "integer", None, 0, 100, 1)


def call_settings(plan: Plan, limits: ServeSettings) -> Iterator[Setting]:
    """The arguments of the pipeline in ``serve.call=``."""
    for name in sorted(limits.call_names):
        default = plan.call.get(name)
        number = default if isinstance(default, int | float) else None
        yield Setting(f"call.{name}", name, "number", number, help="argument of the pipeline")


def plan_body(plan: Plan) -> dict[str, Any]:
    """A plan as a client sees it, without any path of the server."""
    facts, run = plan.facts, plan.run
    return {
        "model": plan.model,
        "strategies": list(plan.plugins),
        "exactness": exactness_line(plan),
        "mesh": processes(plan.axes, plan.world),
        "device": plan.device,
        "dtype": plan.dtype,
        "width": run.width,
        "height": run.height,
        "seconds": (run.frames or 1) / (run.fps or FPS) if facts.video else None,
        "tokens": facts.tokens,
        "blocks": facts.blocks,
        "patches": plan.patches,
        "shards": plan.shards,
        "ranks": [rank_body(plan, rank) for rank in range(plan.world)],
    }


def rank_body(plan: Plan, rank: int) -> dict[str, Any]:
    """The share of a rank.

    Returns:
        ``work``: what it does, in words. ``blocks``: first block, and the one after the last. ``patch``: the only patch
        that it computes, None if it computes all of them. ``shard``: which part of each patch it holds. ``writes``: it
        has results of its own.
    """
    coordinates = plan.coordinates(rank)
    shard, patch, work = 0, None, list[str]()
    for axis in plan.axes:
        index, degree = coordinates[axis.name], axis.degree or 1
        if axis.shards_tokens:
            shard = shard * degree + index
        elif degree > 1 and axis.name != plan.stages:
            kind = divided_by(plan, axis)
            patch = index if kind == "patch" else patch
            work.append(f"{kind} {index + 1} of {degree}")
    stage = coordinates.get(plan.stages, 0)
    start = sum(plan.split[:stage])
    blocks = [start, start + plan.split[stage]]
    if plan.shards > 1:
        work.append(f"tokens, part {shard + 1} of {plan.shards}")
    if plan.degree(plan.stages) > 1:
        work.append(f"blocks {blocks[0]} to {blocks[1] - 1}")
    return {
        "rank": rank,
        "work": work or ["all of it"],
        "blocks": blocks,
        "patch": patch,
        "shard": shard,
        "writes": plan.owns(rank),
    }


def divided_by(plan: Plan, axis: Axis) -> str:
    """A word for what the ranks of an axis have different parts of."""
    plugin = axis.setting.partition(".")[0] or axis.name
    slots = [slot for slot, name in plan.claims.items() if name == plugin]
    if axis.own_outputs:
        return "pictures, share"
    if "patches" in slots and axis.degree == plan.patches:
        return "patch"
    if "guidance" in slots:
        return "guidance, half"
    return "weights, part" if "weights" in slots else axis.name
