"""Make the plan of one request: the plan of the engine with some settings changed, which passes the same checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from xdit_core.errors import PlanRefused, UsageError
from xdit_core.model_spec import ModelSpec
from xdit_core.plan import Plan
from xdit_core.planning.checks import check_lora_scale, check_loras
from xdit_core.planning.planner import make_plan
from xdit_core.records import Problem, join_words
from xdit_core.registry.registry import Registry
from xdit_core.settings import lora_texts

# Settings that may differ from request to request; everything else is decided by the plan.
PER_REQUEST = frozenset(
    (
        "negative",
        "steps",
        "guidance",
        "height",
        "width",
        "frames",
        "images",
        "seed",
        "output_type",
        "max_sequence_length",
        "scheduler",
        "lora",
    )
)
# Settings of the plan that were checked when the engine was made, and are slow to check again.
LOADED = ("lora", "scheduler")
STRUCTURE = ("split", "patches", "stages", "claims", "wraps", "transforms")


def structure_of(plan: Plan) -> dict[str, Any]:
    """What an engine is built for, by name; of an axis its degree, as the other choices change with the size."""
    axes = [(axis.name, axis.degree) for axis in plan.axes]
    return {"axes": axes, **{name: getattr(plan, name) for name in STRUCTURE}}


def check_names(changes: Mapping[str, Any], what: str) -> None:
    """Refuse settings that a request cannot change.

    Args:
        what: takes the settings, for the message.

    Raises:
        UsageError: names them.
    """
    if unknown := sorted(set(changes) - PER_REQUEST - {"call"}):
        raise UsageError(
            f"{what} does not take {', '.join(unknown)}; it takes {', '.join(sorted(PER_REQUEST))}, and other "
            "arguments of the pipeline in call={...}; the rest is decided by the plan."
        )


def texts_of(
    prompts: Sequence[str | Sequence[str] | None], changes: Mapping[str, Any]
) -> tuple[list[str | None], tuple[str, ...], dict[str, Any]]:
    """Take apart prompts of which each picture has a text of its own.

    Args:
        prompts: each a text, a list with a text for each picture, or None.
        changes: as of `plan_of_request`; ``negative`` may be a list where prompts are.

    Returns:
        All texts; what to keep out of each picture, () if that is the same for all; and the changes for one text.

    Raises:
        UsageError: the lists are not of one length, or that is not the number of pictures.
    """
    lists = [prompt for prompt in prompts if isinstance(prompt, (list, tuple))]
    if not lists:
        texts: list[Any] = list(prompts)  # what is no text is refused later
        return texts, (), dict(changes)
    negative, seed, images = changes.get("negative"), changes.get("seed"), len(lists[0])
    given = {len(part) for part in (*lists, *(x for x in (negative, seed) if isinstance(x, (list, tuple))))}
    one_seed = isinstance(seed, (list, tuple)) and len(seed) == 1
    if len(lists) < len(prompts) or not images or (given - {1} if one_seed else given) != {images}:
        raise UsageError("a list of texts has one for each picture; give all prompts, negative and seed equally many.")
    if changes.get("images", images) != images:
        raise UsageError(f"there are {images} texts for images={changes['images']}; leave out images=.")
    negatives = tuple(negative) if isinstance(negative, (list, tuple)) else ()
    texts = [text for part in lists for text in part]
    if not all(isinstance(text, str) and text.strip() for text in texts) or not all(
        isinstance(text, str) for text in negatives
    ):
        raise UsageError("a list of texts holds something that is no text; give what each picture shows.")
    one = {"negative": negatives[0]} if negatives else {}
    return [*texts], negatives, {**changes, "images": images, **one}


def plan_of_request(
    plan: Plan,
    spec: ModelSpec,
    registry: Registry,
    pipeline: str,
    prompts: Sequence[str | None],
    changes: Mapping[str, Any],
) -> Plan:
    """The plan of a request; with its ``run`` and ``call`` the pipeline is called.

    Args:
        plan: of the engine.
        spec: of the model.
        pipeline: class that is called.
        prompts: what to draw; ``[None]`` if embeddings say so.
        changes: any of ``PER_REQUEST``, and ``call``: further arguments of the pipeline's ``__call__`` by name.

    Raises:
        UsageError: an argument that is unknown or decided by the plan, or of a wrong type.
        PlanRefused: what this model or these strategies cannot do, or what needs an engine of its own.
    """
    check_names(changes, "generate")
    if changes.get("seed") == "random" and plan.world > 1:
        raise UsageError("seed=random would be another number on every rank; give all of them the same number.")
    call = changes.get("call") or {}
    if not isinstance(call, Mapping):
        raise UsageError(f"call={call} is not a mapping; write call={{'name': value}} with arguments of the pipeline.")
    by_embeddings = call.get("prompt_embeds") is not None
    if (by_embeddings and any(prompts)) or not (by_embeddings or all(isinstance(prompt, str) for prompt in prompts)):
        raise UsageError("give either a prompt, or None and call={'prompt_embeds': ...}.")
    left_out = ("prompt", "prompts", "class", *LOADED)
    values = {key: value for key, value in plan.values.items() if key not in left_out}
    values |= {a.setting: a.degree for a in plan.axes if a.setting}
    values |= {"model.path": plan.folder, "nproc": plan.world, "device": plan.device}
    values |= {spec.request.subject: [prompt for prompt in prompts if prompt]} if any(prompts) else {}
    values |= {name: value for name, value in changes.items() if name not in ("call", "lora")}
    values |= {f"call.{name}": value for name, value in call.items()}
    request_plan = make_plan(list(plan.plugins), values, registry, pipeline=pipeline)
    loras = plan.run.lora if changes.get("lora") is None else lora_texts(changes["lora"])
    run = replace(request_plan.run, lora=loras)
    problems = check_lora_scale(run, request_plan.call) + (check_loras(run) if loras != plan.run.lora else [])
    structure = structure_of(plan)
    changed = [name for name, part in structure_of(request_plan).items() if part != structure[name]]
    if changed:
        sentence = f"with these settings the plan would have other {join_words(changed)} than this engine's"
        problems.append(Problem(sentence, "make an Engine of such a plan"))
    if problems:
        raise PlanRefused(problems)
    return replace(request_plan, run=run)
