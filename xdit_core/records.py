"""What strategies declare: frozen records, without torch, so that the launcher can read them.

Vocabulary: an *axis* is an axis of the mesh of ranks (a dimension of a tensor is a *dim*); a *stage* holds some of the
blocks; a *patch* is a part of the picture that is computed at one time; a *shard* is a part of the tokens that one rank
computes; a *slot* is something that only one plugin may own; a *wrap* is middleware ``f(inner, x) -> y`` at one of the
extension points. What a model adapter declares is in ``xdit_core.model_spec``.
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
    """How often the ranks of an axis exchange data. It orders the axes of the mesh: the rarest is outermost."""

    PER_IMAGE = 0
    PER_STEP = 1
    PER_STAGE = 2
    PER_RING_HOP = 3
    PER_LAYER = 4


# The extension points and the levels of each at which a wrap can be placed, outermost first.
POINTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "request": ("split",),
        "forward": ("reuse", "split", "patches"),
        "trunk": ("gather", "stage", "reuse"),
        "attention": ("exchange", "cache", "ring", "kernel"),
        "decode": ("split",),
    }
)


# The slots that follow from what a strategy declares. The key is a field of the declaration, a property of an axis, a
# level or a phase; the value is the slot and the reason why only one plugin can have it. At a level that is not here,
# wraps of several plugins nest.
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


# The phases at load time in which transforms change the modules, in this order. In ``adapt`` and ``shard`` a transform
# gets the denoiser while its parameters have shapes and no values; what it leaves is read from disk. In the others it
# gets the loaded pipeline; in ``offload`` with the strategies in place, and still on the CPU.
PHASES = ("adapt", "shard", "quantize", "compile", "offload")


@dataclass(frozen=True)
class Axis:
    """One axis of the mesh.

    Args:
        name: a name that no other plugin uses, such as ``ulysses``.
        degree: number of ranks along the axis. None leaves it open: the planner chooses it for the number of processes.
        traffic: how often its ranks exchange data.
        choices: the degrees that the model allows; None if it allows any. An open degree becomes one of them.
        shards_tokens: its ranks divide the tokens among themselves, so they are part of the token layout.
        shards_heads: its ranks divide the attention heads. The product of the degrees of all such axes must divide the
            number of heads.
        own_outputs: its ranks make different pictures.
        messages: its ranks send each other messages, and rarely enter collectives.
        last_resort: the planner leaves an open degree at 1 unless the other axes cannot use all processes.
        why: what limits the choices, for messages: "sd3 has 24 heads".
        setting: the setting that sets its degree, such as ``usp.ulysses``.
    """

    name: str
    degree: int | None
    traffic: Traffic
    choices: tuple[int, ...] | None = None
    shards_tokens: bool = False
    shards_heads: bool = False
    own_outputs: bool = False
    messages: bool = False
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
    """Announces a wrap at a level of an extension point. Its callable is built on the rank, see ``Built.wraps``."""

    point: str
    level: str


@dataclass(frozen=True)
class Transform:
    """Announces a change of the modules in one of the ``PHASES``. Its callable is in ``Built.transforms``."""

    phase: str


FIDELITIES = ("exact", "displaced", "approximate", "unverified")  # from the strongest promise to none


@dataclass(frozen=True)
class Fidelity:
    """How close the result of a strategy is to that of one process without it.

    Args:
        kind: ``exact``: equal up to rounding. ``displaced``: patches attend to keys and values of the step before; the
            result equals that of the same schedule in one process, see ``reference``. ``approximate``: differs by at
            most ``bound`` from the reference, or from one process without the strategy if there is no reference.
            ``unverified``: nothing is promised.
        bound: for ``approximate``, the largest difference of the latents, relative to their largest absolute value.
        reference: called with the degrees of all axes; returns the settings with which this plugin computes the same
            result in one process.
    """

    kind: str = "unverified"
    bound: float = 0.0
    reference: Callable[[Mapping[str, int]], Mapping[str, Any]] | None = None


EXACT = Fidelity("exact")


@dataclass(frozen=True)
class Stages:
    """How a strategy divides the blocks of the denoiser among the ranks of an axis, which are its stages.

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
        axes: its axes of the mesh.
        claims: slots that it must own alone, in addition to those that follow from the other fields (``SLOTS``).
        wraps: the extension points that it uses.
        transforms: its changes of the modules at load time.
        stages: how it divides the blocks among ranks; None if it does not.
        patches: called with the degrees of all axes; returns the number of patches into which the picture is cut. None
            if it does not cut the picture.
        fidelity: how close its result is to that of one process. By default nothing is promised.
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
        """Its claims, and the slots that follow from its other fields."""
        declared = [name for name in ("stages", "patches") if getattr(self, name)]
        declared += ["shards_tokens" for axis in self.axes if axis.shards_tokens]
        declared += [f"{wrap.point}/{wrap.level}" for wrap in self.wraps] + [
            transform.phase for transform in self.transforms
        ]
        claims = {claim.slot: claim for claim in self.claims}
        for slot, why in (SLOTS[name] for name in declared if name in SLOTS):
            claims.setdefault(slot, Claim(slot, why))
        return tuple(claims.values())


@dataclass(frozen=True)
class ModelFacts:
    """What a plan needs to know of a model. It is read from the JSON files of the checkpoint before anything is loaded.

    Args:
        model: name of the adapter.
        heads: number of attention heads of a block; 0 if the denoiser has no list of blocks.
        blocks: number of blocks in all lists.
        rows, columns, frames: the grid of image tokens at the size that the user asks for.
        text_tokens: largest number of text tokens that go through the blocks.
        pixels_per_token: pixels a side that one token covers.
        has_tp_plan: the adapter says how the linear layers of a block can be divided.
        uses_cfg: every step has a conditional and an unconditional prediction (classifier-free guidance).
        frame_step: frames of the video that a latent frame stands for; 0 if the model makes pictures.
        row_unit: number of rows of tokens that must stay together where the picture is cut.
        loras: fingerprints of the LoRA files that are added to the weights.
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
        """The number of image tokens."""
        return self.frames * self.rows * self.columns


@dataclass(frozen=True)
class Built(Record):
    """What a strategy puts onto a rank.

    Args:
        wraps: the callable ``f(inner, x) -> y`` of each declared wrap, under ``point/level``.
        transforms: the callable of each declared transform, under its phase: ``f(denoiser) -> None`` or
            ``f(pipe) -> None``, see ``PHASES``.
        job: returns a context manager that is entered before every job, which is one call of the pipeline, and left
            after it. It releases what it acquired. After a job that succeeded it may wait for other ranks. If the job
            fails, the exception comes out of the ``yield``, and it must not wait: another rank may be gone.
        close: called when the engine is closed.
    """

    wraps: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    transforms: Mapping[str, Callable[[Any], None]] = field(default_factory=dict)
    job: Callable[[], AbstractContextManager[None]] | None = None
    close: Callable[[], None] | None = None


def divisors(n: int) -> tuple[int, ...]:
    """All divisors of ``n``, ascending."""
    return tuple(d for d in range(1, n + 1) if n % d == 0)


def join_words(values: Sequence[object]) -> str:
    """``1, 2 and 3`` for a message."""
    texts = [str(v) for v in values]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"
