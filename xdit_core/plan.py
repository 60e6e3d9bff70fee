"""Discover, select, parse, declare, complete, sort, check, freeze: from plugin names and settings to a plan.

A plan is plain data. The launcher makes it, writes it as JSON, and every rank makes it again from the same plugins and
settings; ranks whose digests differ stop before the first collective.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from xdit_core import checkpoint, degrees, hub, machine
from xdit_core.checks import (
    check_lora_scale,
    check_loras,
    check_run,
    check_size,
    check_subject,
    check_taken,
    needs_blocks,
    with_defaults,
)
from xdit_core.errors import ModelError, PlanRefused, PluginError, UsageError, XditError
from xdit_core.fingerprints import checkpoint_fingerprint
from xdit_core.frozen import Record
from xdit_core.owners import Owner
from xdit_core.records import FIDELITIES, PHASES, POINTS, Axis, Declaration, Facts, Fidelity, Problem, listed
from xdit_core.registry import STRATEGIES, Registry
from xdit_core.schedulers import check_scheduler
from xdit_core.settings import (
    SIDE_SETTINGS,
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
from xdit_core.signatures import typed_call
from xdit_core.validation import check_declaration, problems_of


@dataclass(frozen=True)
class Plan(Record):
    """Everything that decides what a run computes.

    Args:
        plugins: selected strategies, name to (distribution, version).
        model: name of the adapter.
        model_origin: its (distribution, version).
        folder: local folder of the checkpoint.
        values: the settings as given, so that a rank can make the plan again.
        run: the shared settings with the model's defaults filled in.
        call: further arguments of the pipeline's ``__call__``.
        axes: mesh axes with their degrees, outermost first.
        wraps: for each point, (level, plugin), outermost first.
        transforms: (phase, plugin) in the order in which they run.
        claims: slot to plugin.
        stages: name of the axis along which the blocks are divided, "" if they are not.
        split: number of blocks of each stage; one entry if they are not divided.
        patches: cuts of the tokens in time.
        fidelity: for each plugin how near its result is to that of one process, see ``Fidelity``.
        bound: largest difference of the latents that approximate plugins allow, in parts of the largest value.
        compared: plugins that bring the reference.
        reference: settings with which these plugins alone compute the same in one process.
        facts: what was read from the model's files.
    """

    plugins: Mapping[str, tuple[str, str]]
    model: str
    model_origin: tuple[str, str]
    folder: str
    values: Mapping[str, Any]
    run: RunSettings
    call: Mapping[str, Any]
    axes: tuple[Axis, ...]
    wraps: Mapping[str, tuple[tuple[str, str], ...]]
    transforms: tuple[tuple[str, str], ...]
    claims: Mapping[str, str]
    stages: str
    split: tuple[int, ...]
    patches: int
    fidelity: Mapping[str, str]
    bound: float
    compared: tuple[str, ...]
    reference: Mapping[str, Any]
    facts: Facts
    notes: tuple[str, ...] = ()

    @property
    def displaced(self) -> tuple[str, ...]:
        """Plugins that use keys and values of the step before."""
        return tuple(name for name, kind in self.fidelity.items() if kind == "displaced")

    @property
    def exactness(self) -> str:
        """The fidelity of the whole: that of the plugin that promises least."""
        return max(self.fidelity.values(), key=FIDELITIES.index, default="exact")

    @property
    def world(self) -> int:
        """Number of ranks."""
        return degrees.product(a.degree or 1 for a in self.axes)

    def degree(self, axis: str) -> int:
        """Degree of an axis, 1 if the plan has no such axis."""
        return next((a.degree or 1 for a in self.axes if a.name == axis), 1)

    @property
    def shards(self) -> int:
        """Ranks that divide the tokens among themselves."""
        return degrees.product(a.degree or 1 for a in self.axes if a.shards_tokens)

    def to_json(self) -> str:
        """The plan for a file; ``from_json`` reads it."""
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True)

    @staticmethod
    def from_json(text: str) -> Plan:
        """Read what ``to_json`` wrote."""
        d = json.loads(text)
        run: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in d["run"].items()}
        d["run"] = RunSettings(**run)
        d["axes"] = tuple(Axis(**{**a, "choices": None if a["choices"] is None else tuple(a["choices"])}) for a in d["axes"])
        d["wraps"] = {point: tuple((level, name) for level, name in pairs) for point, pairs in d["wraps"].items()}
        d["transforms"] = tuple((phase, name) for phase, name in d["transforms"])
        d["plugins"] = {name: tuple(origin) for name, origin in d["plugins"].items()}
        d["facts"] = Facts(**{**d["facts"], "loras": tuple(d["facts"]["loras"])})
        for key in ("model_origin", "split", "compared", "notes"):
            d[key] = tuple(d[key])
        return Plan(**d)

    def coordinates(self, rank: int) -> dict[str, int]:
        """A rank's place on every axis; the last axis runs fastest."""
        found: dict[str, int] = {}
        for axis in reversed(self.axes):
            rank, found[axis.name] = divmod(rank, axis.degree or 1)
        return {a.name: found[a.name] for a in self.axes}

    def owns(self, rank: int) -> bool:
        """The rank writes results."""
        place = self.coordinates(rank)
        return all(place[a.name] == 0 for a in self.axes if not a.own_outputs)

    @property
    def dtype(self) -> str:
        """In what the denoiser runs: as given, or what suits the device."""
        return self.run.dtype or ("float32" if self.run.device == "cpu" else "bfloat16")

    @cached_property
    def checkpoint(self) -> str | None:
        """What tells the contents of the checkpoint from others, None if it cannot be read here."""
        return checkpoint_fingerprint(Path(self.folder))

    def digest(self) -> str:
        """Equal digests compute the same thing: where files lie or are written, and how a run is watched, does not enter."""
        data = json.loads(self.to_json())
        for key in ("folder", "notes"):
            del data[key]
        for key in SIDE_SETTINGS:
            data["run"].pop(key, None)
        own = {f.name.rstrip("_") for f in dataclasses.fields(RunSettings)}  # these are in ``run``, with their defaults
        data["values"] = {
            k: v for k, v in data["values"].items() if k not in own and k not in ("model.path", "model.download_dir")
        }
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


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
        weights: fetch the weights too if the checkpoint is on the hub; a plan that is only looked at needs its JSON files.
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
        spec, model_origin = registry.model_for(checkpoint.pipeline_class(folder))
    else:
        spec, model_origin = registry.model(values["model"])
        folder = hub.locate(spec, where, weights=weights)
    configs = checkpoint.open_checkpoint(spec, folder, weights or not hub.on_hub(spec, where))
    run = with_defaults(given, spec, configs)
    call, wrong_call = typed_call(spec, pipeline or str(configs["_index"].get("_class_name")), call_settings(values))
    problems = check_run(run) + check_taken(given, spec) + check_loras(run) + wrong_call
    asked = {**dataclasses.asdict(run), **call}
    facts = checkpoint.facts(spec, configs, asked)
    facts = dataclasses.replace(facts, loras=() if problems else checkpoint.fingerprints(parse_loras(run.lora)))
    problems += check_size(run, facts)
    problems += check_scheduler(run.scheduler, configs.get("scheduler", {})) + check_lora_scale(run, call)
    with checkpoint.describing(spec):
        problems += check_subject(run, spec, configs)
        problems += spec.check(configs, asked) if spec.check else ()

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
            raise PluginError(f"plugin {name} failed to divide blocks or tokens: {type(error).__name__}: {error}.") from error
    fidelity = {n: d.fidelity.kind if d.fidelity.kind != "displaced" or patches > 1 else "exact" for n, d in declared.items()}
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
            *filter(None, (spec.notes(configs, subject) for subject in run.prompt) if spec.notes else ()),
        ),
    )
    checks = registry.call("xdit_check", {n: {**arguments[n], "plan": plan} for n in chosen})
    problems = [p for name, found in checks.items() for p in of(name, problems_of(found, Owner("plugin", name, *chosen[name])))]
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
        raise PluginError(f"plugin {name} declares the fidelity {fidelity.kind!r}; {did_you_mean(fidelity.kind, FIDELITIES)}")
    if fidelity.kind == "displaced" and fidelity.reference is None:
        raise PluginError(f"plugin {name} is displaced and names no reference; give one in its Fidelity.")
    if fidelity.bound < 0 or (fidelity.bound and fidelity.kind != "approximate"):
        raise PluginError(
            f"plugin {name} is {fidelity.kind} with the bound {fidelity.bound}; only what is approximate has one, above 0."
        )
    return fidelity.reference or (lambda degrees: {})


def idle_ranks(axes: Sequence[Axis], run: RunSettings) -> list[str]:
    """A note for each axis whose ranks make different pictures, if there are fewer pictures than ranks."""
    pictures = run.images * len(run.prompt)
    return [
        f"{a.setting or a.name}={a.degree} for {pictures} picture{'s' if pictures > 1 else ''}: the other ranks have nothing to draw"
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
    return {p: tuple(sorted(pairs, key=lambda pair: (order[p][pair[0]], pair[1]))) for p, pairs in sorted(result.items())}


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
            f"this process makes another plan than the launcher did ({listed(different)} differ); "
            "install the same versions of xdit and its plugins everywhere."
        )


__all__ = ["ModelError", "Plan", "make_plan", "same_plan"]
