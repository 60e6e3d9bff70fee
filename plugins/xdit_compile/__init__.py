"""``torch.compile``: by default every repeated block by itself, compiled once and used for all of its kind.

The blocks stay whole (``fullgraph=True``): what a strategy does inside a block is one opaque operation,
``xdit::attention``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from xdit_core import EXACT, Built, Claim, Declaration, ModelFacts, Problem, Transform, hookimpl

if TYPE_CHECKING:
    from xdit_core import Plan, Rank

SCOPES = ("blocks", "transformer")
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@dataclass(frozen=True)
class Settings:
    """Settings of ``compile``."""

    scope: str = field(default="blocks", metadata={"help": "blocks: each repeated block; transformer: the whole of it"})
    mode: str | None = field(default=None, metadata={"help": f"one of {', '.join(MODES)}"})
    backend: str = field(default="inductor", metadata={"help": "a backend of torch.compile"})
    fullgraph: bool = field(default=True, metadata={"help": "fail instead of leaving compiled code"})
    dynamic: bool | None = field(
        default=None, metadata={"help": "code for all sizes; by default from the second size on"}
    )


@hookimpl
def xdit_settings() -> type[Settings]:
    """``compile.scope``, ``.mode``, ``.backend``, ``.fullgraph``, ``.dynamic``."""
    return Settings


@hookimpl
def xdit_declare(settings: Settings, facts: ModelFacts) -> Declaration:
    """A change of the modules."""
    problems = []
    if settings.scope not in SCOPES:
        problems.append(Problem(f"compile.scope={settings.scope} is unknown", f"use one of {', '.join(SCOPES)}"))
    if settings.mode is not None and settings.mode not in MODES:
        problems.append(Problem(f"compile.mode={settings.mode} is unknown", f"use one of {', '.join(MODES)}"))
    if settings.mode is not None and settings.backend != "inductor":
        problems.append(
            Problem(f"compile.mode belongs to inductor and compile.backend={settings.backend}", "drop one of them")
        )
    return Declaration(
        claims=(Claim("code", "it compiles the denoiser"),),
        transforms=(Transform("compile"),),
        problems=tuple(problems),
        fidelity=EXACT,
    )


@hookimpl
def xdit_check(settings: Settings, facts: ModelFacts, plan: Plan) -> Iterator[Problem]:
    """The whole transformer can only be compiled where nothing happens between its blocks."""
    inside = sorted({name for point in ("trunk", "attention") for _, name in plan.wraps.get(point, ())})
    if settings.scope == "transformer" and inside:
        yield Problem(
            f"compile.scope=transformer makes one graph of all blocks, and {', '.join(inside)} works between them",
            f"use compile.scope=blocks, or drop {', '.join(inside)}",
        )


@hookimpl
def xdit_build(settings: Settings, rank: Rank) -> Built:
    """The transform."""
    from xdit_compile.strategy import Compile

    compiler = Compile(settings, rank)
    return Built(transforms={"compile": compiler}, job=compiler.job)
