"""Describe plans, plugins and models in lines for a person. Without torch."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xdit_core import machine
from xdit_core.errors import XditError
from xdit_core.model_spec import ModelSpec
from xdit_core.outputs.metadata import FPS
from xdit_core.planning.degrees import processes
from xdit_core.records import FIDELITIES
from xdit_core.registry.discovery import installed
from xdit_core.registry.registry import MODELS, STRATEGIES, Registry
from xdit_core.settings import fields_of
from xdit_launcher.inspection import inspect_strategy

if TYPE_CHECKING:
    from xdit_core.plan import Plan
    from xdit_launcher.backends.base import Backend

WIDTH = 14
MANY = 10  # prompts or files that are listed


def row(name: str, text: object) -> str:
    """One line of a listing."""
    return f"{name:<{WIDTH}}{text}"


def rows(name: str, texts: Sequence[object]) -> Iterator[str]:
    """A line for each text, or only for the first few of very many."""
    shown = texts if len(texts) <= MANY else texts[: MANY - 1]
    yield from (row(name, text) for text in shown)
    if len(shown) < len(texts):
        yield row(name, f"... and {len(texts) - len(shown)} more")


def settings_help(cls: type[Any] | None, prefix: str = "") -> Iterator[str]:
    """``usp.ulysses  int (default: chosen for you)  what it is`` for every setting of a class."""
    shown = [
        (f"{prefix}{name}=", type_name(kind), default_of(f), f.metadata.get("help", ""))
        for name, kind, f in settings_fields(cls)
    ]
    wide = [max((len(s[i]) for s in shown), default=0) for i in range(3)]
    for key, kind, default, text in shown:
        yield f"{key:<{wide[0]}}  {kind:<{wide[1]}}  {default:<{wide[2]}}  {text}".rstrip()


def settings_fields(cls: type[Any] | None) -> Iterator[tuple[str, Any, dataclasses.Field[Any]]]:
    """Name, type and field of every setting of a class."""
    if cls is not None:
        for (name, kind), field in zip(fields_of(cls).items(), dataclasses.fields(cls), strict=True):
            yield name, kind, field


def type_name(kind: Any) -> str:
    """The name of a type for a person."""
    text = kind.__name__ if isinstance(kind, type) and "[" not in str(kind) else str(kind)
    return text.replace("tuple[int, ...]", "int,int,...").replace("tuple[str, ...]", "str").replace(" | None", "")


def default_of(field: dataclasses.Field[Any]) -> str:
    """The default of a setting as text; ``auto`` where model and machine decide."""
    value = field.default
    if value is None or value is dataclasses.MISSING:
        return "auto"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "auto"
    return str(value)


def plan_lines(
    plan: Plan,
    files: Sequence[Path],
    command: Sequence[str],
    on: Backend,
    target: Sequence[str] = (),
    on_this_machine: bool = True,
) -> Iterator[str]:
    """Describe a plan.

    Args:
        files: where the results go.
        command: the words of the command line that say what to run.
        on: the backend that would start it.
        target: the words that are for the backend.
        on_this_machine: all processes run on this machine.
    """
    yield from subject_lines(plan, files)
    yield row("plugins", ", ".join(f"{n} ({' '.join(o)})" for n, o in plan.plugins.items()) or "none")
    yield row("runs in", f"{plan.dtype} on {plan.device}, {threads_line(plan, on_this_machine)}")
    yield from mesh_lines(plan)
    yield row("exactness", exactness_line(plan))
    for point, pairs in plan.wraps.items():
        yield row("at " + point, " > ".join(f"{name} ({level})" for level, name in pairs))
    for slot, name in sorted(plan.claims.items()):
        yield row("slot", f"{slot}: {name}")
    for note in plan.notes:
        if note != processes(plan.axes, plan.world):  # which the line about the mesh says
            yield row("note", note)
    yield from command_lines(plan, command, on, target)


def subject_lines(plan: Plan, files: Sequence[Path]) -> Iterator[str]:
    """The model, what it draws, and where the results go."""
    run, facts = plan.run, plan.facts
    yield row("model", f"{plan.model} ({' '.join(plan.model_origin)}) in {plan.folder}")
    yield row("video" if facts.video else "picture", subject_line(plan))
    several = f"  ({run.images} {'videos' if facts.video else 'pictures'})" if run.images > 1 else ""
    yield from rows("prompt", [prompt + several for prompt in run.prompt])
    yield from (row("writes", file) for file in files)  # all of them, so that none comes as a surprise
    yield row("tokens", f"{facts.rows} x {facts.columns} = {facts.tokens}, and at most {facts.text_tokens} of text")
    if facts.blocks:
        yield row("blocks", f"{facts.blocks} with {facts.heads} heads each")


def mesh_lines(plan: Plan) -> Iterator[str]:
    """The mesh, and the place and work of each rank."""
    yield row("mesh", processes(plan.axes, plan.world))
    starts = [sum(plan.split[:i]) for i in range(len(plan.split) + 1)]
    for rank in range(plan.world if plan.world > 1 else 0):
        coordinates = plan.coordinates(rank)
        stage = coordinates.get(plan.stages, 0)
        where = ", ".join(f"{name} {i}" for name, i in coordinates.items() if plan.degree(name) > 1) or "alone"
        owns = plan.owns(rank)
        owner = "; writes its results" if owns and rank else "; writes the results" if owns else ""
        yield row("", f"rank {rank}: {where}; blocks {starts[stage]} to {starts[stage + 1] - 1}{owner}")
    if plan.patches > 1:
        yield row("patches", f"{plan.patches} in time")


def command_lines(plan: Plan, command: Sequence[str], on: Backend, target: Sequence[str]) -> Iterator[str]:
    """The commands that start the run; for the arguments see `plan_lines`."""
    yield row("command", shlex.join(["xdit-launch", *target, *command]))
    yield from (row(f"on {on.name}" if i == 0 else "", line) for i, line in enumerate(on.show(plan, command)))
    words = shlex.join(["xdit-launch", "run", "--dry-run", "--json", *command])
    yield row("by hand", f"{words} > plan.json; torchrun --nproc-per-node {plan.world} -m xdit_core.worker plan.json")


def subject_line(plan: Plan) -> str:
    """Size, length, steps, guidance and seed of what is drawn."""
    run = plan.run
    parts = [f"{run.width} x {run.height}"]
    if plan.facts.video:
        frames, fps = run.frames or 1, run.fps or FPS
        parts.append(f"{frames} frame{'s' if frames > 1 else ''} at {fps} a second ({frames / fps:.1f} s)")
    parts.append(f"{run.steps} steps")
    parts += [f"guidance {run.guidance:g}"] if run.guidance is not None else []
    return ", ".join([*parts, f"seed {','.join(map(str, run.seed))}"])


def threads_line(plan: Plan, on_this_machine: bool) -> str:
    """CPU threads of each process.

    Args:
        on_this_machine: all processes run on this machine.
    """
    if plan.run.threads is None and not on_this_machine:
        return "each host's cores shared among the threads of its processes"
    count = plan.run.threads or machine.threads(plan.world)
    return f"{count} CPU thread{'s' if count > 1 else ''}{' each' if plan.world > 1 else ''}"


def exactness_line(plan: Plan) -> str:
    """How the result compares with that of one process without plugins."""
    thing = "video" if plan.facts.video else "picture"
    kinds = {kind: [name for name, fidelity in plan.fidelity.items() if fidelity == kind] for kind in FIDELITIES}
    names = ", ".join(kinds[plan.exactness]) if plan.plugins else ""
    if plan.exactness == "displaced":
        return f"displaced ({names}): the {thing} differs a little from that of one process"
    if plan.exactness == "approximate":
        return f"approximate ({names}): latents within {plan.bound:g} of their largest value of those of one process"
    if plan.exactness == "unverified":
        return f"unverified ({names}): nothing is promised about the {thing}; compare with xdit-launch verify"
    return f"the {thing} of one process, within rounding" if plan.plugins else f"the {thing} of plain diffusers"


def plugin_list() -> Iterator[str]:
    """A line or two for each strategy, and after them a line for each that is broken."""
    everyone = installed(STRATEGIES)
    strategies = [inspect_strategy(plugins[0]) for plugins in everyone.plugins.values() if len(plugins) == 1]
    healthy = [strategy for strategy in strategies if not strategy.error]
    wide = max((len(strategy.plugin.name) for strategy in healthy), default=0)
    for strategy in healthy:
        plugin = strategy.plugin
        yield f"{plugin.name:<{wide}}  {plugin.distribution} {plugin.version}  {strategy.summary}".rstrip()
        if strategy.declaration and strategy.declaration.owns:
            yield f"{'':<{wide}}  owns {', '.join(c.slot for c in strategy.declaration.owns)}"
    yield from (f"broken: {one_line(strategy.error)}" for strategy in strategies if strategy.error)
    yield from (f"broken: {notice}." for notice in everyone.notices)
    if not strategies:
        yield (
            "no plugin is installed; install xdit again, or a distribution with entry points in the group xdit.plugins."
        )


def one_line(text: str) -> str:
    """A message of several lines as one line."""
    return " ".join(text.split())


def plugin_page(name: str) -> Iterator[str]:
    """Describe one strategy.

    Raises:
        XditError: it is not installed or broken.
    """
    plugin = Registry().pick(STRATEGIES, name)
    strategy = inspect_strategy(plugin)
    yield row("plugin", name)
    yield row("from", f"{plugin.distribution} {plugin.version} ({plugin.entry.value})")
    if strategy.error:
        yield row("broken", strategy.error)
        return
    if strategy.text:
        yield from ("", *strategy.text.splitlines(), "")
    if strategy.declaration:
        for axis in strategy.declaration.axes:
            setting = f", set by {axis.setting}=" if axis.setting else ""
            yield row("axis", f"{axis.name} ({axis.traffic.name.lower().replace('_', ' ')}){setting}")
        for claim in strategy.declaration.owns:
            yield row("owns", f"{claim.slot}: {claim.why}")
        yield row("fidelity", strategy.declaration.fidelity.kind)
        for wrap in strategy.declaration.wraps:
            yield row("wraps", f"{wrap.point}, level {wrap.level}")
    for line in settings_help(strategy.settings, f"{name}."):
        yield row("setting", line)


def source(spec: ModelSpec) -> str:
    """Where the weights of a model come from if no path is given."""
    return "bundled" if spec.checkpoint.path else spec.checkpoint.hub or "needs model.path="


def model_list() -> Iterator[str]:
    """A line for each model, and after them a line for each that is broken."""
    everyone, healthy, broken = installed(MODELS), [], []
    for plugin in (plugins[0] for plugins in everyone.plugins.values() if len(plugins) == 1):
        try:
            healthy.append((plugin, Registry().model(plugin.name)[0]))
        except XditError as error:
            broken.append(one_line(str(error)))
    wide = max((len(plugin.name) for plugin, _ in healthy), default=0)
    for plugin, spec in healthy:
        origin = f"{plugin.distribution} {plugin.version}"
        yield f"{plugin.name:<{wide}}  {origin}  {', '.join(spec.checkpoint.pipelines)}; {source(spec)}"
    yield from (f"broken: {text}" for text in broken)
    yield from (f"broken: {notice}." for notice in everyone.notices)
    if not healthy and not broken:
        yield "no model is installed; install xdit again, or a distribution with entry points in the group xdit.models."
