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
class Declaration:
    """What a strategy brings to a plan.

    Args:
        axes: its mesh axes.
        claims: slots that it must own alone, beside those that follow from the rest (``SLOTS``).
        wraps: where it attaches.
        transforms: what it does to the modules once.
        stages: name of the axis along which the blocks are divided, or "".
        block_split: number of blocks of each stage; called with the resolved degree of that axis.
        patches: the number of patches the tokens are cut into in time; called with the resolved degrees.
        fidelity: how near its result is to that of one process; a strategy that says nothing is unverified.
        problems: what is wrong with its settings, whatever the degrees will be.
    """

    axes: tuple[Axis, ...] = ()
    claims: tuple[Claim, ...] = ()
    wraps: tuple[Wrap, ...] = ()
    transforms: tuple[Transform, ...] = ()
    stages: str = ""
    block_split: Callable[[int], tuple[int, ...]] | None = None
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
class Stream(Record):
    """How one block is called: names of its arguments and the order of what it returns.

    Where arguments are named with a dim, ``NAME.1`` stands for item 1 of a tuple, and ``(dim, dims)`` for a tensor that
    is aligned only if it has so many dims.

    Args:
        tokens: argument with the picture's tokens ``[B, n, D]``.
        text: argument with the text tokens ``[B, t, D]`` that go through the blocks, "" if none do.
        joined: the text tokens lie behind the picture's in ``tokens``.
        aligned: other arguments that are aligned with the picture's tokens, with the dim along which (rotary tables).
        words: arguments that are aligned with the text tokens.
        joint: arguments that are aligned with the rows of joint attention.
        returns: which of ``tokens`` / ``text`` the block returns, in order.
        text_first: in joint attention the text rows precede the picture's rows.
        skip: argument that takes the tokens of an earlier block, see ``ModelSpec.long_skips``.
        frames: argument that takes the number of frames, which then lie in the batch: ``[B x frames, n, D]``.
    """

    tokens: str = "hidden_states"
    text: str = ""
    joined: bool = False
    aligned: Mapping[str, int | tuple[int, int]] = field(default_factory=dict)
    words: Mapping[str, int | tuple[int, int]] = field(default_factory=dict)
    joint: Mapping[str, int | tuple[int, int]] = field(default_factory=dict)
    returns: tuple[str, ...] = ("tokens",)
    text_first: bool = False
    skip: str = ""
    frames: str = ""


@dataclass(frozen=True)
class Blocks:
    """One block list of the denoiser.

    Args:
        attribute: name of the ``nn.ModuleList`` on the denoiser.
        count: key of the denoiser's config that holds its length.
        beside: lists of the same length whose blocks run with those of this one.
        make: given the denoiser, the index in the list and the blocks of all these lists at that index, what runs as
            one block; without it the block itself.
        stream: how a block of this list is called, if not as ``ModelSpec.stream`` says. Between lists with different
            streams the denoiser does something of its own.
    """

    attribute: str
    count: str
    beside: tuple[str, ...] = ()
    make: Callable[..., Any] | None = None
    stream: Stream | None = None


@dataclass(frozen=True)
class ModelSpec(Record):
    """A model family, as data. An adapter builds one of these and nothing else.

    Args:
        name: the word for ``model=``.
        pipelines: names of the diffusers pipeline classes that it fits; the first is the usual one.
        more_pipelines: names of diffusers classes that take the denoiser in the same way and pictures beside the text;
            they can be given to an Engine ready-made.
        hub: hub id used when no path is given; "" if the model is bundled (then ``path``).
        path: folder of a bundled checkpoint, "" if none.
        denoiser: component that holds the trunk.
        blocks: its block lists in the order in which they run.
        stream: how a block is called.
        attention: for a block module, the kinds of its attention calls in order: ``joint`` (picture and text rows),
            ``self`` (picture rows only), or ``cross`` (keys and values that every rank has, of the text or of the other
            frames at the same place; left alone).
        more_denoisers: components of the same kind as the denoiser that the pipeline calls in its place at some steps.
        long_skips: given the number of blocks, which of them take the tokens behind which earlier block, as
            ``Stream.skip``.
        kept: submodules of the first block that the denoiser's own forward uses as well.
        latents: argument of the denoiser's forward with the latents ``[B, C, h, w]``, with frames ``[B, C, f, h, w]``,
            or packed: ``[B, rows x columns, C]``.
        listed: latents and prediction are lists of tensors without the batch dim, and so may be other arguments.
        frame_dim: dim of the latents along which the frames lie, None without frames.
        frame_step: from the component configs, how many frames of the video a latent frame stands for; None if it makes
            pictures. A video of ``n`` frames has ``(n - 1) / step + 1`` latent frames.
        row_unit: from the denoiser's config, how many rows of tokens a cut must leave together; 1 if it is None.
        tail: for a number of picture tokens, how many rows the denoiser puts behind them.
        text_input: argument of forward whose identity tells the branches of a step apart.
        text_rows: from the arguments of forward, how many text rows go through the blocks; by default those of
            ``text_input``.
        fixed: arguments of forward that are given these values where blocks are a trunk; the pipeline must leave them
            at their defaults.
        unbatched: arguments of forward without a batch dim (rotary tables, position ids).
        guided: given the shared settings and ``call.*``, whether a step has a conditional and an unconditional half; by
            default if ``guidance`` is above 1.
        skips: argument of forward that lists blocks to leave out, "" if it has none.
        refused: arguments of forward that cannot be honoured, each with the reason.
        heads, patch: keys of the denoiser's config: number of attention heads, latent elements a side of a token: one
            number, or those of frames, rows and columns. "" if it has none.
        patch_frames: key of the denoiser's config: latent frames of a token, "" if ``patch`` says it or it is one.
        token_pixels: pixels a side that a token covers, from the component configs; by default those of a latent times
            ``patch``.
        text_tokens: most text tokens that enter the trunk, from the component configs and the call settings.
        matrices: for tensor parallelism, patterns (as of ``fnmatch``) of names of linear layers, each ``colwise``,
            ``rowwise`` or ``gathered``; None if there is no such plan, empty if the denoiser's class brings its own
            (``_tp_plan``).
        embeddings: submodules of the denoiser that embed the latents, their one argument; where the rows come from
            another stage, they are not run again.
        conditioning: patterns (as of ``fnmatch``) of names of submodules whose result depends on the step and its
            conditions (time, text) and not on the picture; computed once a call of the denoiser, not once a patch.
        defaults: values for the shared settings (``steps``, ``guidance``, ``height``, ``width``, ``prompt`` ...).
        call: what each shared setting is called in the pipeline's ``__call__``, "" if it takes none. ``images`` is the
            number of pictures of a call; if it takes none, every picture is a call.
        subject: the setting that says what to draw, ``prompt`` or ``class``.
        drawn: from the component configs, the subject and the number of pictures, the value for the pipeline; by
            default the subject. Raises ValueError with what is wrong and what to give.
        check: from the component configs and what was asked, what this model cannot do.
        notes: from the component configs and the subject, a line for the user about what is to be expected, "" if there
            is nothing to say.
        latent_output: the pipeline knows ``output_type=latent``; if not, latents are what its VAE is given.
    """

    name: str
    pipelines: tuple[str, ...]
    blocks: tuple[Blocks, ...] = ()
    attention: Callable[[Any], tuple[str, ...]] = lambda block: ("self",)
    stream: Stream = field(default_factory=Stream)
    more_pipelines: tuple[str, ...] = ()
    hub: str = ""
    path: str = ""
    denoiser: str = "transformer"
    more_denoisers: tuple[str, ...] = ()
    long_skips: Callable[[int], Mapping[int, int]] | None = None
    kept: tuple[str, ...] = ()
    latents: str = "hidden_states"
    listed: bool = False
    frame_dim: int | None = None
    frame_step: Callable[[Mapping[str, Any]], int] | None = None
    row_unit: Callable[[Mapping[str, Any]], int] | None = None
    tail: Callable[[int], int] | None = None
    text_input: str = "encoder_hidden_states"
    text_rows: Callable[[Mapping[str, Any]], int] | None = None
    fixed: Mapping[str, Any] = field(default_factory=dict)
    unbatched: tuple[str, ...] = ()
    guided: Callable[[Mapping[str, Any]], bool] | None = None
    skips: str = ""
    refused: Mapping[str, str] = field(default_factory=dict)
    heads: str = "num_attention_heads"
    patch: str = "patch_size"
    patch_frames: str = ""
    token_pixels: Callable[[Mapping[str, Any]], int] | None = None
    text_tokens: Callable[[Mapping[str, Any], Mapping[str, Any]], int] | None = None
    matrices: Mapping[str, str] | None = None
    embeddings: tuple[str, ...] = ()
    conditioning: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    call: Mapping[str, str] = field(default_factory=dict)
    subject: str = "prompt"
    drawn: Callable[[Mapping[str, Any], str, int], Any] | None = None
    check: Callable[[Mapping[str, Any], Mapping[str, Any]], Sequence[Problem]] | None = None
    notes: Callable[[Mapping[str, Any], str], str] | None = None
    latent_output: bool = True

    @property
    def denoisers(self) -> tuple[str, ...]:
        """The components that may denoise."""
        return (self.denoiser, *self.more_denoisers)

    def patch_sizes(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """Latent frames, and latent elements a side, of a token."""
        value = config[self.patch] if self.patch else 1
        sizes = list(value) if isinstance(value, (list, tuple)) else [value]
        frames = (config.get(self.patch_frames) if self.patch_frames else sizes[0] if len(sizes) == 3 else None) or 1
        return int(frames), int(sizes[-1])


@dataclass(frozen=True)
class ModelFacts:
    """What a plan needs to know of a model, read from its JSON files before anything is loaded.

    Args:
        heads: attention heads of a block.
        blocks: number of blocks in all lists.
        rows, columns, frames: the token grid at the size asked for.
        text_tokens: most text tokens in the trunk.
        pixels_per_token: pixels a side that one token covers.
        matrices: the adapter says how the matrices of a block can be divided.
        guided: every step has a conditional and an unconditional half.
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
    matrices: bool = False
    guided: bool = True
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


def listed(values: Sequence[object]) -> str:
    """``1, 2 and 3`` for a message."""
    texts = [str(v) for v in values]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"
