"""From names of plugins and settings to a plan: discover, select, parse, declare, complete, sort, check, freeze.

Every rank makes the plan again from the same plugins and settings; ranks whose digests differ stop before the first
collective.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from xdit_core.checkpoints import hub, model_facts
from xdit_core.checkpoints.schedulers import check_scheduler
from xdit_core.errors import PlanRefused, PluginError, UsageError, XditError
from xdit_core.plan import Plan
from xdit_core.planning import degrees, machine
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
from xdit_core.planning.settings import (
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
from xdit_core.planning.signatures import typed_call
from xdit_core.records import FIDELITIES, PHASES, POINTS, Axis, Declaration, Fidelity, Problem, join_words
from xdit_core.registry.owners import Owner
from xdit_core.registry.registry import STRATEGIES, Registry
from xdit_core.registry.validation import check_declaration, problems_of


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
    chosen = registry.select([plugins] if isinstance(plugins, str) else plugins)
    values = without_random(values)
    classes = registry.call("xdit_settings", {name: {} for name in chosen})
    known: dict[str, type[Any] | None] = {"": RunSettings, "model.": ModelSettings}
    known |= {name + ".": cls for name, cls in classes.items()}
    unselected = {n: n for n in registry.names(STRATEGIES) if n not in chosen}
    wrong = check_keys(values, known, unselected)
    if wrong:
        raise UsageError(*wrong)
    if not values.get("model") or not isinstance(values["model"], str):
        raise UsageError(f"no model; add model=NAME with one of {', '.join(registry.names('xdit.models'))}, or auto.")
    for name, cls in classes.items():
        check_class(cls, name)
    own = {name: build(classes.get(name), name + ".", values) for name in chosen}
    given = build(RunSettings, "", {k: v for k, v in values.items() if k != "model"})

    where = build(ModelSettings, "model.", values)
    if values["model"] == hub.AUTO.name:
        folder = hub.locate(hub.AUTO, where, weights=weights)
        spec, model_origin = registry.model_for(model_facts.pipeline_class(folder))
    else:
        spec, model_origin = registry.model(values["model"])
        folder = hub.locate(spec, where, weights=weights)
    configs = model_facts.open_checkpoint(spec, folder, weights or not hub.on_hub(spec, where))
    run = with_defaults(given, spec, configs)
    call, wrong_call = typed_call(spec, pipeline or str(configs["_index"].get("_class_name")), call_settings(values))
    problems = check_run(run) + check_taken(given, spec) + check_loras(run) + wrong_call
    asked = {**dataclasses.asdict(run), **call}
    facts = model_facts.facts(spec, configs, asked)
    facts = dataclasses.replace(facts, loras=() if problems else model_facts.fingerprints(parse_loras(run.lora)))
    problems += check_size(run, facts)
    problems += check_scheduler(run.scheduler, configs.get("scheduler", {})) + check_lora_scale(run, call)
    with model_facts.describing(spec):
        problems += check_subject(run, spec, configs)
        problems += spec.request.check(configs, asked) if spec.request.check else ()

    arguments = {name: {"settings": own[name], "facts": facts} for name in chosen}
    declared: dict[str, Declaration] = registry.call("xdit_declare", arguments)
    for name in chosen:
        check_declaration(declared.get(name), Owner("plugin", name, *chosen[name]))
    problems += [p for name, d in declared.items() for p in of(name, d.problems)]
    problems += [p for name, d in declared.items() if not facts.blocks for p in of(name, needs_blocks(name, d, facts))]
    claims, clashes = settle_claims(declared)
    problems += clashes
    wraps = sort_wraps(declared)
    if problems:  # degrees completed from wrong settings would only add noise
        raise PlanRefused(problems)

    gpus = 0 if run.device == "cpu" else machine.cuda_devices()
    run = dataclasses.replace(run, device=run.device or ("cuda" if gpus else "cpu"))
    axes = {n: d.axes for n, d in declared.items()}
    suits = devices or gpus or machine.cores()
    result = degrees.complete(axes, run.nproc, suits, grow=not gpus, heads=facts.heads, model=facts.model)
    if result.problems:
        raise PlanRefused(result.problems)
    by_name = {a.name: a.degree or 1 for a in result.axes}
    divider = next((d for d in declared.values() if d.stages), None)
    split: tuple[int, ...] = (facts.blocks,)
    patches = 1
    reference: dict[str, Any] = {}
    for name, d in declared.items():
        try:
            split = d.block_split(by_name.get(d.stages, 1)) if d.stages and d.block_split else split
            patches = d.patches(by_name) if d.patches else patches
            reference |= check_fidelity(name, d.fidelity)(by_name)
        except PluginError:
            raise
        except Exception as error:
            raise PluginError(
                f"plugin {name} failed to divide blocks or tokens: {type(error).__name__}: {error}."
            ) from error
    fidelity = {
        n: d.fidelity.kind if d.fidelity.kind != "displaced" or patches > 1 else "exact" for n, d in declared.items()
    }
    plan = Plan(
        plugins=chosen,
        model=spec.name,
        model_origin=model_origin,
        folder=str(folder),
        values=values,
        run=run,
        call=call,
        axes=result.axes,
        wraps=wraps,
        transforms=sort_transforms(declared),
        claims=claims,
        stages=divider.stages if divider else "",
        split=split,
        patches=patches,
        fidelity=fidelity,
        bound=max((d.fidelity.bound for d in declared.values() if d.fidelity.kind == "approximate"), default=0.0),
        compared=tuple(n for n, d in declared.items() if d.fidelity.reference and fidelity[n] != "exact"),
        reference=reference,
        facts=facts,
        notes=(
            *result.notes,
            *idle_ranks(result.axes, run),
            *filter(
                None, (spec.request.notes(configs, subject) for subject in run.prompt) if spec.request.notes else ()
            ),
        ),
    )
    checks = registry.call("xdit_check", {n: {**arguments[n], "plan": plan} for n in chosen})
    problems = [
        p for name, found in checks.items() for p in of(name, problems_of(found, Owner("plugin", name, *chosen[name])))
    ]
    if problems:
        raise PlanRefused(problems)
    return plan


def of(plugin: str, problems: Sequence[Problem]) -> list[Problem]:
    """The problems with their plugin's name."""
    return [dataclasses.replace(p, plugin=plugin) for p in problems]


def check_fidelity(name: str, fidelity: Fidelity) -> Callable[[Mapping[str, int]], Mapping[str, Any]]:
    """The settings of the reference as a function of the degrees.

    Raises:
        PluginError: the fidelity cannot be what it says.
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
            f"above 0."
        )
    return fidelity.reference or (lambda degrees: {})


def idle_ranks(axes: Sequence[Axis], run: RunSettings) -> list[str]:
    """A note for each axis whose ranks make different pictures, if there are fewer pictures than ranks."""
    pictures = run.images * len(run.prompt)
    return [
        f"{a.setting or a.name}={a.degree} for {pictures} picture{'s' if pictures > 1 else ''}: the other ranks have "
        f"nothing to draw"
        for a in axes
        if a.own_outputs and (a.degree or 1) > pictures
    ]


def settle_claims(declared: Mapping[str, Declaration]) -> tuple[dict[str, str], list[Problem]]:
    """Who owns which slot; two claims on one slot are a problem that names both."""
    owners: dict[str, tuple[str, str]] = {}
    problems = []
    for name in sorted(declared):
        for claim in declared[name].owns:
            if claim.slot in owners:
                other, why = owners[claim.slot]
                problems.append(
                    Problem(
                        f"{other} and {name} both need the slot {claim.slot!r} ({other}: {why}; {name}: {claim.why})",
                        f"drop one of {other} and {name}",
                        name,
                    )
                )
            else:
                owners[claim.slot] = (name, claim.why)
    return {slot: name for slot, (name, _) in owners.items()}, problems


def sort_wraps(declared: Mapping[str, Declaration]) -> dict[str, tuple[tuple[str, str], ...]]:
    """The wraps of each point in the order of its levels, then of the plugins' names.

    Raises:
        PluginError: a wrap names a point or level that does not exist.
    """
    result: dict[str, list[tuple[str, str]]] = {}
    for name in sorted(declared):
        for wrap in declared[name].wraps:
            if wrap.level not in POINTS.get(wrap.point, ()):
                raise PluginError(
                    f"plugin {name} wraps {wrap.point}/{wrap.level}, which does not exist; levels are "
                    + "; ".join(f"{p}: {', '.join(levels)}" for p, levels in POINTS.items())
                    + "."
                )
            result.setdefault(wrap.point, []).append((wrap.level, name))
    order = {point: {level: i for i, level in enumerate(levels)} for point, levels in POINTS.items()}
    return {
        p: tuple(sorted(pairs, key=lambda pair: (order[p][pair[0]], pair[1]))) for p, pairs in sorted(result.items())
    }


def sort_transforms(declared: Mapping[str, Declaration]) -> tuple[tuple[str, str], ...]:
    """The transforms in the order of the phases, then of the plugins' names.

    Raises:
        PluginError: a transform names a phase that does not exist.
    """
    pairs = [(t.phase, name) for name in sorted(declared) for t in declared[name].transforms]
    for phase, name in pairs:
        if phase not in PHASES:
            raise PluginError(
                f"plugin {name} transforms in the phase {phase}, which does not exist; phases are {', '.join(PHASES)}."
            )
    return tuple(sorted(pairs, key=lambda pair: (PHASES.index(pair[0]), pair[1])))


def same_plan(plan: Plan, registry: Registry | None = None) -> None:
    """Make the plan again from its plugins and settings and compare: other versions would compute something else.

    Raises:
        XditError: it came out different here.
    """
    same: dict[str, Any] = {"model.path": plan.folder, "nproc": plan.world, "device": plan.run.device}
    values = dict(plan.values)
    if values.pop("prompts", None) is not None:  # the file may lie on another machine
        same["prompt"] = plan.run.prompt
    mine = make_plan(list(plan.plugins), {**values, **same}, registry, devices=plan.world)
    ours, theirs = json.loads(mine.to_json()), json.loads(plan.to_json())
    for data in (ours, theirs):
        for key in ("values", "notes", "folder"):
            del data[key]
        data["run"]["nproc"] = data["run"]["prompts"] = None
    different = [key for key in theirs if ours[key] != theirs[key]]
    if different:
        raise XditError(
            f"this process makes another plan than the launcher did ({join_words(different)} differ); "
            "install the same versions of xdit and its plugins everywhere."
        )
