"""What plugins declare: frozen records, without torch, so that the launcher can read them.

Vocabulary: an *axis* is one of the mesh (never a tensor dimension, that is a *dim*); a *stage* holds some of the
blocks; a *patch* is a part of the picture in time; a *shard* is a part of the tokens across ranks; a *slot* is what
only one plugin may own; a *wrap* is middleware ``f(inner, x) -> y`` at one of the extension points.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import IntEnum
from types import MappingProxyType
from typing import Any

from xdit_core.frozen import Record


class Traffic(IntEnum):
    """How often the ranks of an axis talk; the mesh is ordered by it, outermost first."""

    PER_IMAGE = 0
    PER_STEP = 1
    PER_STAGE = 2
    PER_RING_HOP = 3
    PER_LAYER = 4


# The extension points and, at each, the levels at which a wrap can sit, outermost first.
POINTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "request": ("split",),
        "forward": ("reuse", "split", "patches"),
        "trunk": ("gather", "stage", "reuse"),
        "attention": ("exchange", "cache", "ring", "kernel"),
        "decode": ("split",),
    }
)


# The slots that follow from what a strategy declares: by a field of the declaration, a property of an axis, a level or
# a phase, the slot and why only one can have it. At a level that is not here wraps of several plugins nest.
SLOTS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "stages": ("blocks", "it divides the blocks among stages"),
        "patches": ("patches", "it cuts the picture into patches"),
        "shards_tokens": ("tokens", "it divides the tokens among ranks"),
        "forward/split": ("guidance", "it divides the calls of the denoiser among ranks"),
        "forward/patches": ("patches", "it gives the denoiser the patches of the picture"),
        "trunk/gather": ("tokens", "it brings the tokens of the ranks together"),
        "trunk/stage": ("blocks", "it takes the tokens from stage to stage"),
        "attention/exchange": ("exchange", "it exchanges heads for tokens"),
        "attention/cache": ("kv", "it keeps keys and values from step to step"),
        "attention/ring": ("ring", "it passes keys and values around"),
        "attention/kernel": ("kernel", "it computes the attention"),
        "decode/split": ("decode", "it divides the decoding of a picture"),
        "shard": ("weights", "it divides the matrices of the blocks"),
        "compile": ("code", "it compiles the denoiser"),
        "offload": ("placement", "it moves weights between the CPU and the device"),
    }
)


# What happens to the modules once, at load time: the phases in which transforms run, whatever plugins bring them. In
# ``adapt`` and ``shard`` they get the denoiser while its parameters have shapes and no values: what they leave is what
# is read from disk. In the others they get the loaded pipeline; in ``offload`` with the strategies woven in, and still
# on the CPU.
PHASES = ("adapt", "shard", "quantize", "compile", "offload")


@dataclass(frozen=True)
class Axis:
    """One axis of the mesh.

    Args:
        name: unique over all plugins, such as ``ulysses``.
        degree: number of ranks along it; None leaves it open, to be completed for the processes asked for.
        traffic: how often its ranks talk.
        choices: the degrees that the model allows, None for any; an open degree is completed from these.
        shards_tokens: its ranks divide the tokens among themselves (they enter the token layout).
        shards_heads: its ranks divide the attention heads; all such axes together must.
        own_outputs: its ranks make different pictures.
        last_resort: an open degree stays 1 unless the other axes cannot fill the processes.
        why: for messages, what limits the choices: "sd3 has 24 heads".
        setting: the setting that sets its degree, such as ``usp.ulysses``.
    """

    name: str
    degree: int | None
    traffic: Traffic
    choices: tuple[int, ...] | None = None
    shards_tokens: bool = False
    shards_heads: bool = False
    own_outputs: bool = False
    last_resort: bool = False
    why: str = ""
    setting: str = ""


@dataclass(frozen=True)
class Claim:
    """A slot that only one plugin may own, and why this plugin needs it."""

    slot: str
    why: str


@dataclass(frozen=True)
class Problem:
    """Why a plan cannot run, and what to change. Both are shown to the user."""

    what: str
    fix: str
    plugin: str = ""

    def __str__(self) -> str:
        return f"{self.what}; {self.fix}."


@dataclass(frozen=True)
class Wrap:
    """A declared wrap: at which point and level. The callable itself is built on the rank (``Built.wraps``)."""

    point: str
    level: str


@dataclass(frozen=True)
class Transform:
    """A declared change of the modules at load time, in one of ``PHASES``; the callable is in ``Built.transforms``."""

    phase: str


FIDELITIES = ("exact", "displaced", "approximate", "unverified")  # the further back, the less is promised


@dataclass(frozen=True)
class Fidelity:
    """How near the result of a strategy is to that of one process without it.

    Args:
        kind: ``exact``: equal within rounding. ``displaced``: keys and values of the step before are used; where there
            are patches, it equals the same schedule in one process, which ``reference`` names. ``approximate``: within
            ``bound`` of the reference, or of one process without the strategy if it names none. ``unverified``: nothing
            is promised.
        bound: of an approximate one, the largest difference of the latents in parts of their largest value.
        reference: settings under which this plugin computes the same in one process; called with the resolved degrees.
    """

    kind: str = "unverified"
    bound: float = 0.0
    reference: Callable[[Mapping[str, int]], Mapping[str, Any]] | None = None


EXACT = Fidelity("exact")


@dataclass(frozen=True)
class Stages:
    """Divides the blocks of the denoiser among the ranks of an axis, each of which is a stage.

    Args:
        axis: name of the axis.
        block_split: called with the degree of that axis; returns the number of blocks of each stage.
    """

    axis: str
    block_split: Callable[[int], tuple[int, ...]]


@dataclass(frozen=True)
class Declaration:
    """What a strategy brings to a plan.

    Args:
        axes: its mesh axes.
        claims: slots that it must own alone, beside those that follow from the rest (``SLOTS``).
        wraps: where it attaches.
        transforms: what it does to the modules once.
        stages: how it divides the blocks among ranks; None if it does not.
        patches: the number of patches the tokens are cut into in time; called with the resolved degrees.
        fidelity: how near its result is to that of one process; a strategy that says nothing is unverified.
        problems: what is wrong with its settings, whatever the degrees will be.
    """

    axes: tuple[Axis, ...] = ()
    claims: tuple[Claim, ...] = ()
    wraps: tuple[Wrap, ...] = ()
    transforms: tuple[Transform, ...] = ()
    stages: Stages | None = None
    patches: Callable[[Mapping[str, int]], int] | None = None
    fidelity: Fidelity = Fidelity()
    problems: tuple[Problem, ...] = ()

    @property
    def owns(self) -> tuple[Claim, ...]:
        """Its claims, and those that follow from what it declares."""
        declared = [name for name in ("stages", "patches") if getattr(self, name)]
        declared += ["shards_tokens" for axis in self.axes if axis.shards_tokens]
        declared += [f"{wrap.point}/{wrap.level}" for wrap in self.wraps] + [
            transform.phase for transform in self.transforms
        ]
        found = {claim.slot: claim for claim in self.claims}
        for slot, why in (SLOTS[name] for name in declared if name in SLOTS):
            found.setdefault(slot, Claim(slot, why))
        return tuple(found.values())


@dataclass(frozen=True)
class ModelFacts:
    """What a plan needs to know of a model, read from its JSON files before anything is loaded.

    Args:
        heads: attention heads of a block.
        blocks: number of blocks in all lists.
        rows, columns, frames: the token grid at the size asked for.
        text_tokens: most text tokens in the trunk.
        pixels_per_token: pixels a side that one token covers.
        has_tp_plan: the adapter says how the linear layers of a block can be divided.
        uses_cfg: every step has a conditional and an unconditional prediction (classifier-free guidance).
        frame_step: frames of the video for a latent frame, 0 if the model makes pictures.
        row_unit: rows of tokens that a cut must leave together.
        loras: fingerprints of the files that are added to the weights.
    """

    model: str
    heads: int
    blocks: int
    rows: int
    columns: int
    text_tokens: int
    pixels_per_token: int
    has_tp_plan: bool = False
    uses_cfg: bool = True
    frames: int = 1
    frame_step: int = 0
    row_unit: int = 1
    loras: tuple[str, ...] = ()

    @property
    def video(self) -> bool:
        """The model makes videos."""
        return self.frame_step > 0

    @property
    def tokens(self) -> int:
        """Picture tokens."""
        return self.frames * self.rows * self.columns


@dataclass(frozen=True)
class Built(Record):
    """What a strategy puts onto a rank.

    Args:
        wraps: for each declared wrap, under ``point/level``, the callable ``f(inner, x) -> y``.
        transforms: for each declared transform, under its phase, a callable ``f(denoiser) -> None`` or ``f(pipe) ->
            None``, see ``PHASES``.
        request: makes a context manager that is entered before every call of the pipeline and left behind it: what it
            acquires, it releases. Where the call went through, handles are waited for; where it failed, the exception
            comes out of the ``yield``, and no other rank may be waited for, because it may be gone.
        close: called when the engine is closed.
    """

    wraps: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    transforms: Mapping[str, Callable[[Any], None]] = field(default_factory=dict)
    request: Callable[[], AbstractContextManager[None]] | None = None
    close: Callable[[], None] | None = None


def divisors(n: int) -> tuple[int, ...]:
    """All divisors of ``n``, ascending."""
    return tuple(d for d in range(1, n + 1) if n % d == 0)


def join_words(values: Sequence[object]) -> str:
    """``1, 2 and 3`` for a message."""
    texts = [str(v) for v in values]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"
