"""Make a plan from names of plugins and settings.

Every rank makes the plan again from the same plugins and settings; ranks whose digests differ stop before the first
collective.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xdit_core import machine
from xdit_core.checkpoints import hub, model_facts
from xdit_core.checkpoints.schedulers import check_scheduler
from xdit_core.errors import PlanRefused, PluginError, UsageError, XditError
from xdit_core.model_spec import ModelSpec
from xdit_core.plan import Plan
from xdit_core.planning import degrees
from xdit_core.planning.checks import (
    check_lora_scale,
    check_loras,
    check_run,
    check_size,
    check_subject,
    check_taken,
    needs_blocks,
    with_defaults,
)
from xdit_core.planning.ordering import settle_claims, sort_transforms, sort_wraps
from xdit_core.planning.signatures import typed_call
from xdit_core.records import EXACT, FIDELITIES, Axis, Declaration, Fidelity, ModelFacts, Problem, join_words
from xdit_core.registry.owners import Owner
from xdit_core.registry.registry import MODELS, STRATEGIES, Registry
from xdit_core.registry.validation import check_declaration, problems_of
from xdit_core.settings import (
    ModelSettings,
    RunSettings,
    build,
    call_settings,
    check_class,
    check_keys,
    did_you_mean,
    parse_loras,
    without_random,
)

ONLY_OBSERVES = Declaration(fidelity=EXACT)
Origins = Mapping[str, tuple[str, str]]  # name of a plugin to its (distribution, version)
Arguments = Mapping[str, Mapping[str, Any]]  # name of a plugin to the arguments of its hooks


def make_plan(
    plugins: Sequence[str],
    values: Mapping[str, Any],
    registry: Registry | None = None,
    *,
    devices: int | None = None,
    weights: bool = True,
    pipeline: str = "",
) -> Plan:
    """Make the plan, or say everything that is wrong with it.

    Args:
        plugins: names of strategies, in any order.
        values: flat settings: ``{"model": "sd3", "usp.ulysses": "2", "steps": 20}``.
        registry: where plugins come from; by default the installed ones.
        devices: processes that suit this machine, used when ``nproc`` is not given.
        weights: fetch the weights too if the checkpoint is on the hub; a plan that is only looked at needs its JSON
            files.
        pipeline: class whose ``__call__`` gets ``call.*``, by default that of the checkpoint.

    Raises:
        UsageError: an unknown plugin, model or setting, or a value of the wrong type.
        ModelError: the checkpoint is missing or damaged.
        PlanRefused: the parts do not fit; lists every problem.
    """
    registry = registry or Registry()
    origins = registry.select([plugins] if isinstance(plugins, str) else plugins)
    values = without_random(values)
    settings = read_strategy_settings(registry, origins, values)
    typed = build(RunSettings, "", {key: value for key, value in values.items() if key != "model"})
    checkpoint = find_checkpoint(registry, values, weights)
    request = complete_request(typed, values, checkpoint, pipeline)

    arguments = {name: {"settings": settings[name], "facts": request.facts} for name in origins}
    declared = collect_declarations(registry, origins, arguments)
    claims, clashes = settle_claims(declared)
    wraps = sort_wraps(declared)
    # Degrees that are completed from wrong settings would only add noise, so everything so far is refused first.
    refuse([*request.problems, *declared_problems(declared, request.facts), *clashes])

    run, gpus = resolve_device(request.run)
    mesh = complete_degrees(declared, run, request.facts, devices, gpus)
    division = divide_work(declared, mesh.axes, request.facts)
    fidelity = resolve_fidelity(declared, division.patches)
    plan = Plan(
        plugins=origins,
        model=checkpoint.spec.name,
        model_origin=checkpoint.origin,
        folder=str(checkpoint.folder),
        values=values,
        run=run,
        call=request.call,
        axes=mesh.axes,
        wraps=wraps,
        transforms=sort_transforms(declared),
        claims=claims,
        stages=division.stages,
        split=division.split,
        patches=division.patches,
        fidelity=fidelity,
        bound=max((d.fidelity.bound for d in declared.values() if d.fidelity.kind == "approximate"), default=0.0),
        compared=tuple(name for name, d in declared.items() if d.fidelity.reference and fidelity[name] != "exact"),
        reference=division.reference,
        facts=request.facts,
        notes=(*mesh.notes, *idle_ranks(mesh.axes, run), *model_notes(checkpoint, run)),
        observers=tuple(name for name in origins if only_observes(registry, name)),
    )
    refuse(strategy_problems(registry, origins, arguments, plan))
    return plan


def refuse(problems: Sequence[Problem]) -> None:
    """Refuse the plan if there are problems.

    Raises:
        PlanRefused: with all of them.
    """
    if problems:
        raise PlanRefused(problems)


def read_strategy_settings(registry: Registry, origins: Origins, values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of each strategy, as an instance of its settings class or None.

    Raises:
        UsageError: a key that nobody knows, no model, or a value of the wrong type.
        PluginError: a settings class that cannot be used.
    """
    classes = registry.call("xdit_settings", {name: {} for name in origins})
    known: dict[str, type[Any] | None] = {"": RunSettings, "model.": ModelSettings}
    known |= {f"{name}.": cls for name, cls in classes.items()}
    unselected = {name: name for name in registry.names(STRATEGIES) if name not in origins}
    if errors := check_keys(values, known, unselected):
        raise UsageError(*errors)
    if not values.get("model") or not isinstance(values["model"], str):
        raise UsageError(f"no model; add model=NAME with one of {', '.join(registry.names(MODELS))}, or auto.")
    for name, cls in classes.items():
        check_class(cls, name)
    return {name: build(classes.get(name), f"{name}.", values) for name in origins}


@dataclass(frozen=True)
class Checkpoint:
    """The checkpoint of a plan and the adapter that knows it.

    Args:
        spec: what the adapter says of the model.
        origin: (distribution, version) of the adapter.
        folder: where the files are on this machine.
        configs: the JSON files of the components, by component; ``_index`` is ``model_index.json``.
    """

    spec: ModelSpec
    origin: tuple[str, str]
    folder: Path
    configs: Mapping[str, Any]

    @property
    def pipeline(self) -> str:
        """Name of the pipeline class."""
        return str(self.configs["_index"].get("_class_name"))


def find_checkpoint(registry: Registry, values: Mapping[str, Any], weights: bool) -> Checkpoint:
    """Find the checkpoint that the settings name, fetch it if it is on the hub, and read its JSON files.

    Args:
        weights: fetch the weights too.

    Raises:
        UsageError: no adapter of that name is installed.
        ModelError: the checkpoint is missing or damaged.
    """
    where = build(ModelSettings, "model.", values)
    if values["model"] == hub.AUTO.name:
        folder = hub.locate(hub.AUTO, where, weights=weights)
        spec, origin = registry.model_for(model_facts.pipeline_class(folder))
    else:
        spec, origin = registry.model(values["model"])
        folder = hub.locate(spec, where, weights=weights)
    configs = model_facts.open_checkpoint(spec, folder, weights or not hub.on_hub(spec, where))
    return Checkpoint(spec, origin, folder, configs)


@dataclass(frozen=True)
class CompleteRequest:
    """What to draw, with the model's defaults filled in.

    Args:
        run: the shared settings.
        call: further arguments of the pipeline's ``__call__``.
        facts: what these settings make of the model: tokens, blocks, heads.
        problems: what is wrong with the settings.
    """

    run: RunSettings
    call: Mapping[str, Any]
    facts: ModelFacts
    problems: tuple[Problem, ...]


def complete_request(
    typed: RunSettings, values: Mapping[str, Any], checkpoint: Checkpoint, pipeline: str
) -> CompleteRequest:
    """Fill in the model's defaults and check what is asked of the model.

    Args:
        typed: the shared settings as the user gave them.
        values: the flat settings.
        pipeline: class whose ``__call__`` gets ``call.*``, "" for that of the checkpoint.
    """
    spec, configs = checkpoint.spec, checkpoint.configs
    run = with_defaults(typed, spec, configs)
    call, call_problems = typed_call(spec, pipeline or checkpoint.pipeline, call_settings(values))
    problems = check_run(run) + check_taken(typed, spec) + check_loras(run) + call_problems
    everything = {**dataclasses.asdict(run), **call}
    facts = model_facts.facts(spec, configs, everything)
    facts = dataclasses.replace(facts, loras=() if problems else model_facts.fingerprints(parse_loras(run.lora)))
    problems += check_size(run, facts)
    problems += check_scheduler(run.scheduler, configs.get("scheduler", {})) + check_lora_scale(run, call)
    with model_facts.describing(spec):
        problems += check_subject(run, spec, configs)
        problems += spec.request.check(configs, everything) if spec.request.check else ()
    return CompleteRequest(run, call, facts, tuple(problems))


def collect_declarations(registry: Registry, origins: Origins, arguments: Arguments) -> dict[str, Declaration]:
    """Ask every strategy what it brings to the plan; a plugin that only observes brings nothing.

    Raises:
        PluginError: a declaration that cannot be used.
    """
    answers = registry.call("xdit_declare", arguments)
    for name in origins:
        if only_observes(registry, name):
            answers[name] = ONLY_OBSERVES
        check_declaration(answers.get(name), owner_of(name, origins))
    return {name: answers[name] for name in origins}


def only_observes(registry: Registry, plugin: str) -> bool:
    """Whether a plugin watches ranks and brings nothing to a plan."""
    return registry.implements(plugin, "xdit_observe") and not registry.implements(plugin, "xdit_declare")


def declared_problems(declared: Mapping[str, Declaration], facts: ModelFacts) -> list[Problem]:
    """What the strategies find wrong with their settings, and those that need blocks where the model has none."""
    problems = [problem for name, d in declared.items() for problem in with_plugin(name, d.problems)]
    if not facts.blocks:
        for name, d in declared.items():
            problems += with_plugin(name, needs_blocks(name, d, facts))
    return problems


def resolve_device(run: RunSettings) -> tuple[RunSettings, int]:
    """Decide between ``cpu`` and ``cuda`` if the user did not.

    Returns:
        The settings with a device, and the number of GPUs that the run may use.
    """
    gpus = 0 if run.device == "cpu" else machine.cuda_devices()
    return dataclasses.replace(run, device=run.device or ("cuda" if gpus else "cpu")), gpus


def complete_degrees(
    declared: Mapping[str, Declaration], run: RunSettings, facts: ModelFacts, devices: int | None, gpus: int
) -> degrees.CompleteMesh:
    """Choose the degrees that the user left open, and order the axes of the mesh.

    Args:
        devices: processes that suit the machines, None for as many as suit this one.
        gpus: GPUs of this machine that the run may use.

    Raises:
        PlanRefused: no degrees fit.
    """
    axes = {name: d.axes for name, d in declared.items()}
    suitable = devices or gpus or machine.cores()
    mesh = degrees.complete(axes, run.nproc, suitable, grow=not gpus, heads=facts.heads, model=facts.model)
    refuse(mesh.problems)
    return mesh


@dataclass(frozen=True)
class Division:
    """How blocks and tokens are divided.

    Args:
        stages: name of the axis along which the blocks are divided, "" if they are not.
        split: number of blocks of each stage.
        patches: cuts of the tokens in time.
        reference: settings with which the displaced plugins alone compute the same in one process.
    """

    stages: str
    split: tuple[int, ...]
    patches: int
    reference: Mapping[str, Any]


def divide_work(declared: Mapping[str, Declaration], axes: Sequence[Axis], facts: ModelFacts) -> Division:
    """Let the strategies divide blocks and tokens, now that the degrees are known.

    Raises:
        PluginError: a strategy fails at it, or declares a fidelity that cannot be.
    """
    degree = {axis.name: axis.degree or 1 for axis in axes}
    split: tuple[int, ...] = (facts.blocks,)
    patches, reference = 1, dict[str, Any]()
    for name, d in declared.items():
        check_fidelity(name, d.fidelity)
        try:
            if d.stages:
                split = d.stages.block_split(degree.get(d.stages.axis, 1))
            if d.patches:
                patches = d.patches(degree)
            if d.fidelity.reference:
                reference |= d.fidelity.reference(degree)
        except PluginError:
            raise
        except Exception as error:
            raise PluginError(
                f"plugin {name} failed to divide blocks or tokens: {type(error).__name__}: {error}."
            ) from error
    return Division(next((d.stages.axis for d in declared.values() if d.stages), ""), split, patches, reference)


def resolve_fidelity(declared: Mapping[str, Declaration], patches: int) -> dict[str, str]:
    """The fidelity of each strategy; with one patch nothing is displaced."""
    kinds = {name: d.fidelity.kind for name, d in declared.items()}
    return {name: "exact" if kind == "displaced" and patches <= 1 else kind for name, kind in kinds.items()}


def model_notes(checkpoint: Checkpoint, run: RunSettings) -> list[str]:
    """What the adapter tells the user about each prompt."""
    notes = checkpoint.spec.request.notes
    return [note for subject in run.prompt if (note := notes(checkpoint.configs, subject))] if notes else []


def strategy_problems(registry: Registry, origins: Origins, arguments: Arguments, plan: Plan) -> list[Problem]:
    """What the strategies find wrong with the finished plan."""
    answers = registry.call("xdit_check", {name: {**arguments[name], "plan": plan} for name in origins})
    return [
        problem
        for name, answer in answers.items()
        for problem in with_plugin(name, problems_of(answer, owner_of(name, origins)))
    ]


def owner_of(plugin: str, origins: Origins) -> Owner:
    """A plugin, for messages."""
    return Owner("plugin", plugin, *origins[plugin])


def with_plugin(plugin: str, problems: Sequence[Problem]) -> list[Problem]:
    """The problems with the name of their plugin."""
    return [dataclasses.replace(problem, plugin=plugin) for problem in problems]


def check_fidelity(name: str, fidelity: Fidelity) -> None:
    """Refuse a fidelity that contradicts itself.

    Args:
        name: of the plugin.

    Raises:
        PluginError: says what is wrong.
    """
    if fidelity.kind not in FIDELITIES:
        raise PluginError(
            f"plugin {name} declares the fidelity {fidelity.kind!r}; {did_you_mean(fidelity.kind, FIDELITIES)}"
        )
    if fidelity.kind == "displaced" and fidelity.reference is None:
        raise PluginError(f"plugin {name} is displaced and names no reference; give one in its Fidelity.")
    if fidelity.bound < 0 or (fidelity.bound and fidelity.kind != "approximate"):
        raise PluginError(
            f"plugin {name} is {fidelity.kind} with the bound {fidelity.bound}; only what is approximate has one, "
            "above 0."
        )


def idle_ranks(axes: Sequence[Axis], run: RunSettings) -> list[str]:
    """A note for each axis whose ranks make different pictures, if there are fewer pictures than ranks."""
    pictures = run.images * len(run.prompt)
    return [
        f"{a.setting or a.name}={a.degree} for {pictures} picture{'s' if pictures > 1 else ''}: the other ranks have "
        "nothing to draw"
        for a in axes
        if a.own_outputs and (a.degree or 1) > pictures
    ]


def check_same_plan(plan: Plan, registry: Registry | None = None) -> None:
    """Make the plan again from its plugins and settings and compare, since other versions would compute something else.

    Raises:
        XditError: it came out different here.
    """
    same: dict[str, Any] = {"model.path": plan.folder, "nproc": plan.world, "device": plan.device}
    values = dict(plan.values)
    if values.pop("prompts", None) is not None:  # the file may lie on another machine
        same["prompt"] = plan.run.prompt
    again = make_plan(list(plan.plugins), {**values, **same}, registry, devices=plan.world)
    made_here, received = json.loads(again.to_json()), json.loads(plan.to_json())
    for data in (made_here, received):
        for key in ("values", "notes", "folder"):
            del data[key]
        data["run"]["nproc"] = data["run"]["prompts"] = None
    different = [key for key in received if made_here[key] != received[key]]
    if different:
        raise XditError(
            f"this process makes another plan than the launcher did ({join_words(different)} differ); "
            "install the same versions of xdit and its plugins everywhere."
        )
