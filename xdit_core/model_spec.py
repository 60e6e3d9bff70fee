"""What a model adapter declares: frozen records in groups, without torch, so that the launcher can read them.

An adapter builds one ``ModelSpec`` and fills only the groups in which its model differs from the defaults. Patterns are
those of ``fnmatch``, over the names of the denoiser's submodules. ``configs`` are the config files of a checkpoint:
name of the component to content, with ``model_index.json`` under ``_index``. ``asked`` are the shared settings and
those of ``call.*``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from xdit_core.frozen import Record
from xdit_core.records import Problem


@dataclass(frozen=True)
class Checkpoint:
    """The pipeline of a model and where its weights are.

    Args:
        pipelines: names of the diffusers pipeline classes whose checkpoints the adapter fits; the first is the usual
            one.
        more_pipelines: names of diffusers classes that call the denoiser in the same way and take pictures beside the
            text; an Engine accepts them ready-made, as ``pipe=``.
        hub: hub id that is used when the user gives no path; "" if there is none.
        path: folder of a checkpoint that is part of the adapter's package; "" if there is none.
        denoiser: component of the pipeline that denoises.
        more_denoisers: components of the same class as the denoiser that the pipeline calls in its place at some steps.
    """

    pipelines: tuple[str, ...]
    more_pipelines: tuple[str, ...] = ()
    hub: str = ""
    path: str = ""
    denoiser: str = "transformer"
    more_denoisers: tuple[str, ...] = ()

    @property
    def denoisers(self) -> tuple[str, ...]:
        """The components that may denoise."""
        return (self.denoiser, *self.more_denoisers)


@dataclass(frozen=True)
class Aligned:
    """An argument of a block that has one row for each token.

    Args:
        argument: its name.
        dim: dim of the tensor along which the rows lie.
        item: the argument is a tuple, and this item of it has the rows; None if all of it has them.
        dims: it has rows only if the tensor has this number of dims; None if it always has them.
    """

    argument: str
    dim: int = 0
    item: int | None = None
    dims: int | None = None


@dataclass(frozen=True)
class Stream:
    """How the denoiser calls a block: names of its arguments and the order of the values that it returns.

    Args:
        tokens: argument with the image tokens ``[B, n, D]``.
        text: argument with the text tokens ``[B, t, D]`` that go through the blocks; "" if none do.
        joined: the text tokens follow the image tokens in ``tokens``.
        image_aligned: other arguments with a row for each image token, such as rotary tables.
        text_aligned: arguments with a row for each text token.
        joint_aligned: arguments with a row for each row of joint attention.
        returns: which of ``tokens`` and ``text`` the block returns, in this order.
        text_first: the text rows precede the image rows in joint attention.
        skip: argument that takes the tokens which an earlier block returned, see ``TrunkSpec.long_skips``; "" if there
            is none.
        frames: argument that takes the number of frames, which then lie in the batch: ``[B x frames, n, D]``; "" if
            there is none.
    """

    tokens: str = "hidden_states"
    text: str = ""
    joined: bool = False
    image_aligned: tuple[Aligned, ...] = ()
    text_aligned: tuple[Aligned, ...] = ()
    joint_aligned: tuple[Aligned, ...] = ()
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
        beside: lists of the same length whose blocks run in turn with those of this one.
        make: called with the denoiser, an index, and the blocks of all these lists at that index; returns the module
            that runs as one block. Without it, the block of this list runs.
        stream: how a block of this list is called, if not as ``TrunkSpec.stream`` says. Between two lists with
            different streams the denoiser runs code of its own.
    """

    attribute: str
    count: str
    beside: tuple[str, ...] = ()
    make: Callable[..., Any] | None = None
    stream: Stream | None = None


@dataclass(frozen=True)
class TrunkSpec(Record):
    """The trunk: the transformer blocks of the denoiser, in the order in which they run. A U-Net has none.

    Args:
        blocks: the block lists, in the order in which they run.
        stream: how a block is called.
        attention: called with a block; returns the kinds of its attention calls in their order. ``joint``: over image
            and text rows. ``self``: over image rows. ``cross``: over keys and values that every rank has (of the text,
            or of the other frames at the same place), which are not divided.
        heads: key of the denoiser's config that holds the number of attention heads.
        long_skips: called with the number of blocks; returns for each block with a long skip connection the earlier
            block whose tokens it takes as ``Stream.skip``.
        tp_plan: for tensor parallelism, patterns of names of linear layers, each ``colwise``, ``rowwise`` or
            ``gathered`` (``colwise``, and the columns are brought together behind it), or of RMS norms over divided
            columns: ``normed``. Empty if the denoiser's class has a plan of its own (``_tp_plan``); None if there is no
            plan.
        shared_submodules: submodules of the first block that the denoiser's own forward uses too.
        skip_layers: argument of the denoiser's forward that lists blocks to leave out (skip-layer guidance); "" if it
            has none.
        forced_args: arguments of the denoiser's forward that get these values while the blocks are a trunk; the
            pipeline must leave them at their defaults.
    """

    blocks: tuple[Blocks, ...] = ()
    stream: Stream = Stream()
    attention: Callable[[Any], tuple[str, ...]] = lambda block: ("self",)
    heads: str = "num_attention_heads"
    long_skips: Callable[[int], Mapping[int, int]] | None = None
    tp_plan: Mapping[str, str] | None = None
    shared_submodules: tuple[str, ...] = ()
    skip_layers: str = ""
    forced_args: Mapping[str, Any] = field(default_factory=dict)

    def stream_of(self, blocks: Blocks) -> Stream:
        """How the blocks of one of the lists are called."""
        return blocks.stream or self.stream


@dataclass(frozen=True)
class Latents:
    """The shape of the latents, and how they become tokens.

    Args:
        argument: argument of the denoiser's forward with the latents: ``[B, C, h, w]``, with frames
            ``[B, C, f, h, w]``, or packed into tokens ``[B, rows x columns, C]``.
        list_inputs: latents and prediction are lists of tensors without the batch dim; other arguments may be too.
        frame_dim: dim of the latents along which the frames lie; None without frames.
        frame_step: called with ``configs``; returns how many frames of the video one latent frame stands for. A video
            of ``n`` frames has ``(n - 1) / step + 1`` latent frames. None if the model makes pictures.
        patch_size: key of the denoiser's config that holds the latent elements a side of a token: one number, or those
            of frames, rows and columns; "" if a token is one latent element.
        patch_frames: key of the denoiser's config that holds the latent frames of a token; "" if ``patch_size`` says it
            or a token has one.
        token_pixels: called with ``configs``; returns the pixels a side that a token covers. By default those of a
            latent element times ``patch_size``.
        row_unit: called with the denoiser's config; returns how many rows of tokens must stay together where the
            picture is divided. 1 if it is None.
        padding_tokens: called with the number of image tokens; returns how many rows the denoiser adds behind them.
    """

    argument: str = "hidden_states"
    list_inputs: bool = False
    frame_dim: int | None = None
    frame_step: Callable[[Mapping[str, Any]], int] | None = None
    patch_size: str = "patch_size"
    patch_frames: str = ""
    token_pixels: Callable[[Mapping[str, Any]], int] | None = None
    row_unit: Callable[[Mapping[str, Any]], int] | None = None
    padding_tokens: Callable[[int], int] | None = None

    def patch_sizes(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """Latent frames of a token, and latent elements a side of it."""
        value = config[self.patch_size] if self.patch_size else 1
        sizes = list(value) if isinstance(value, (list, tuple)) else [value]
        frames = (config.get(self.patch_frames) if self.patch_frames else sizes[0] if len(sizes) == 3 else None) or 1
        return int(frames), int(sizes[-1])


@dataclass(frozen=True)
class Text:
    """The text, or another condition, that the denoiser is given.

    Args:
        input: argument of the denoiser's forward that differs between the conditional and the unconditional prediction.
        rows: called with the arguments of the denoiser's forward; returns how many text rows go through the blocks. By
            default those of ``input``, if the blocks take text.
        tokens: called with ``configs`` and ``asked``; returns the largest number of text tokens that go through the
            blocks. 0 if it is None.
    """

    input: str = "encoder_hidden_states"
    rows: Callable[[Mapping[str, Any]], int] | None = None
    tokens: Callable[[Mapping[str, Any], Mapping[str, Any]], int] | None = None


@dataclass(frozen=True)
class Caching:
    """What need not be computed again for each patch of the picture.

    Args:
        embeddings: submodules that embed the latents, their only argument. A stage that gets its rows from another one
            does not run them again.
        conditioning: patterns of submodules whose result depends on the step and its conditions (time, text) and not on
            the picture. They run once for each call of the denoiser, and not once for each patch.
    """

    embeddings: tuple[str, ...] = ()
    conditioning: tuple[str, ...] = ()


@dataclass(frozen=True)
class RequestSpec(Record):
    """The call of the pipeline: settings that it takes, their defaults, and what it is asked to draw.

    Args:
        defaults: values for the shared settings (``steps``, ``guidance``, ``height``, ``width`` ...).
        example: what is drawn if the user asks for nothing, "" if there is no such default.
        renamed: for shared settings, the argument of the pipeline's ``__call__`` if it has another name than usual.
            ``images`` is the number of pictures of a call.
        not_taken: shared settings that the pipeline does not take. Without ``images``, every picture is a call.
        subject: the setting that says what to draw, ``prompt`` or ``class``.
        encode_subject: called with ``configs``, the subject and the number of pictures; returns the value for the
            pipeline. By default that is the subject. It raises PlanRefused with a Problem for a subject that the model
            does not know.
        uses_cfg: called with ``asked``; returns whether each step has a conditional and an unconditional prediction
            (classifier-free guidance). By default, if ``guidance`` is above 1.
        check: called with ``configs`` and ``asked``; returns what this model cannot do.
        notes: called with ``configs`` and the subject; returns a line about the result for the user, or "".
        latent_output: the pipeline knows ``output_type=latent``. If not, latents are taken before the VAE decodes them.
    """

    defaults: Mapping[str, Any] = field(default_factory=dict)
    example: str = ""
    renamed: Mapping[str, str] = field(default_factory=dict)
    not_taken: tuple[str, ...] = ()
    subject: str = "prompt"
    encode_subject: Callable[[Mapping[str, Any], str, int], Any] | None = None
    uses_cfg: Callable[[Mapping[str, Any]], bool] | None = None
    check: Callable[[Mapping[str, Any], Mapping[str, Any]], Iterable[Problem]] | None = None
    notes: Callable[[Mapping[str, Any], str], str] | None = None
    latent_output: bool = True

    def takes(self, setting: str) -> bool:
        """The pipeline takes this setting."""
        return setting not in self.not_taken


@dataclass(frozen=True)
class ModelSpec(Record):
    """A model family, as data.

    Args:
        name: the word for ``model=``.
        checkpoint: its pipeline and its weights.
        trunk: its transformer blocks.
        latents: the shape of the latents.
        text: its text tokens.
        caching: what need not be computed for each patch.
        request: how its pipeline is called.
        unbatched_args: arguments of the denoiser's forward without a batch dim (rotary tables, position ids).
        unsupported: arguments of the denoiser's forward that cannot be used while the blocks are a trunk, each with the
            reason.
        owner: who brings it, for messages. The registry fills it in.
    """

    name: str
    checkpoint: Checkpoint
    trunk: TrunkSpec = TrunkSpec()
    latents: Latents = Latents()
    text: Text = Text()
    caching: Caching = Caching()
    request: RequestSpec = RequestSpec()
    unbatched_args: tuple[str, ...] = ()
    unsupported: Mapping[str, str] = field(default_factory=dict)
    owner: str = ""
