"""The whole contract between xdit and its plugins.

A plugin is a module (or any object) registered under the entry-point group ``xdit.plugins`` (strategies) or
``xdit.models`` (adapters), whose functions carry ``@hookimpl``. The order in which plugins are selected or registered
never matters: what runs inside what follows from the records they return. Declarations are collected once, at set-up;
the hot path calls plain functions.

The lifecycle, in order: ``xdit_settings`` -> ``xdit_declare`` -> ``xdit_check`` (launcher, and again on every rank)
-> ``xdit_observe`` -> ``xdit_build`` (every rank). ``xdit_model`` is the only hook of an adapter.

The functions that run in the launcher must not import torch: ``--help`` and refusals are meant to be instant.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pluggy

from xdit_core.model_spec import ModelSpec
from xdit_core.records import Built, Declaration, ModelFacts, Problem

if TYPE_CHECKING:
    from xdit_core.observe.observer import Observer
    from xdit_core.parallel.rank import Rank
    from xdit_core.plan import Plan

PROJECT = "xdit"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def xdit_settings() -> type[Any]:  # type: ignore[empty-body]
    """The typed settings of a strategy.

    When: first, before any other hook of the plugin.
    Where: launcher and every rank; no torch.

    Returns:
        A frozen dataclass. Field ``degree`` of plugin ``usp`` is set by ``usp.degree=2``; a field needs a default,
        a type of ``int``, ``float``, ``bool``, ``str``, or ``tuple[int, ...]`` (each optionally ``| None``), and
        may carry ``field(metadata={"help": "..."})``. Nothing (no such hook): the plugin has no settings.

    Example::

        @dataclass(frozen=True)
        class Settings:
            degree: int | None = field(default=None, metadata={"help": "ranks that share the tokens"})

        @hookimpl
        def xdit_settings():
            return Settings
    """


@hookspec
def xdit_declare(settings: Any, facts: ModelFacts) -> Declaration:  # type: ignore[empty-body]
    """What the strategy brings: axes, claims, wraps, transforms of the modules, the split of the blocks.

    When: after the settings are parsed and the model's JSON files are read, before degrees are completed.
    Where: launcher and every rank; no torch. It must be a pure function: the ranks compare the digest of the result.

    Args:
        settings: an instance of the class from ``xdit_settings``, None without one.
        facts: heads, blocks and token grid of the model.

    Returns:
        A ``Declaration``. Nothing means that the plugin declares nothing, which is an error for a selected strategy.
        What only one plugin may do follows from it (``records.SLOTS``); a claim is needed for what does not follow, or
        to say why in other words.

    Example::

        @hookimpl
        def xdit_declare(settings, facts):
            axis = Axis("ulysses", settings.degree, Traffic.PER_LAYER, choices=divisors(facts.heads),
                        shards_tokens=True, why=f"{facts.model} has {facts.heads} heads", setting="usp.ulysses")
            return Declaration(axes=(axis,), claims=(Claim("tokens", "it divides the tokens"),),
                               wraps=(Wrap("attention", "exchange"), Wrap("trunk", "gather")))
    """


@hookspec
def xdit_check(settings: Any, facts: ModelFacts, plan: Plan) -> Sequence[Problem]:  # type: ignore[empty-body]
    """Look at the completed plan and list what cannot work.

    When: after degrees are completed and wraps are sorted. All problems of all plugins are shown at once.
    Where: launcher and every rank; no torch.

    Returns:
        Problems, each with a fix. Nothing or an empty list: the plan is fine.

    Example::

        @hookimpl
        def xdit_check(settings, facts, plan):
            if facts.tokens < plan.degree("ulysses"):
                yield Problem(f"{facts.tokens} tokens cannot be shared by {plan.degree('ulysses')} ranks",
                              "take a larger picture or lower usp.ulysses")
    """


@hookspec
def xdit_observe(settings: Any, rank: Rank) -> Observer:  # type: ignore[empty-body]
    """Watch a rank: its steps, waits, messages, wraps, blocks, rows and outputs.

    When: once an engine, after the process groups exist and before ``xdit_build``.
    Where: every rank.

    A plugin that has this hook and no ``xdit_declare`` only observes. It is selected with ``--plugins`` like a
    strategy, and changes nothing of what is computed.

    Args:
        settings: an instance of the class from ``xdit_settings``, None without one.
        rank: this rank's view; the observer may keep it.

    Returns:
        An ``Observer``; a method that it does not override costs nothing. Nothing: the plugin does not watch this rank.

    Example::

        class SlowSteps(Observer):
            def __init__(self, limit):
                self.limit, self.last = limit, time.monotonic()

            def job_started(self, job):
                self.last = time.monotonic()

            def step_done(self, step, steps):
                took, self.last = time.monotonic() - self.last, time.monotonic()
                if took > self.limit:
                    print(f"step {step} of {steps} took {took:.1f} s")

        @hookimpl
        def xdit_observe(settings, rank):
            return SlowSteps(settings.limit)
    """


@hookspec
def xdit_build(settings: Any, rank: Rank) -> Built:  # type: ignore[empty-body]
    """Make the callables for the declared wraps.

    When: once an engine, after the process groups exist and before the pipeline is loaded.
    Where: every rank. Import torch and your implementation here, not at module level.

    Args:
        rank: this rank's view: mesh groups, token layout, device, traffic counter, and later the pipeline.

    Returns:
        A ``Built`` whose ``wraps`` has a callable for every wrap declared, under ``point/level``. Nothing: an error if
        wraps were declared.

    Example::

        @hookimpl
        def xdit_build(settings, rank):
            from my_plugin.strategy import Exchange
            exchange = Exchange(rank.group("ulysses"), rank.layout)
            return Built(wraps={"attention/exchange": exchange.attention, "trunk/gather": exchange.gather})
    """


@hookspec
def xdit_model() -> ModelSpec:  # type: ignore[empty-body]
    """Describe a model family.

    When: when ``model=NAME`` (the entry point's name) is selected.
    Where: launcher and every rank; no torch.

    Returns:
        A ``ModelSpec``. Nothing is an error.

    Example::

        @hookimpl
        def xdit_model():
            return ModelSpec(
                name="sd3",
                checkpoint=Checkpoint(pipelines=("StableDiffusion3Pipeline",), hub="stabilityai/..."),
                trunk=TrunkSpec(blocks=(Blocks("transformer_blocks", "num_layers"),), ...),
                ...
            )
    """
