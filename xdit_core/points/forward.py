"""The forward point: one call of the denoiser, by name of argument, through the wraps of the strategies."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import Any, Literal

import torch
from torch import nn

from xdit_core.errors import UnsupportedCall, UsageError
from xdit_core.parallel.rank import Rank
from xdit_core.parallel.tokens import TokenLayout, length
from xdit_core.points.compose import compose
from xdit_core.points.context import ForwardContext, HeadCheck, JobState, Running
from xdit_core.points.trunk import NothingHere


@dataclass(frozen=True, slots=True)
class ForwardCall:
    """One call of the denoiser.

    Args:
        latents: ``[B, C, h, w]``; may be a patch tensor.
        rest: every other argument given, by name.
        context: what is known of the call.
        on_other_ranks: only other ranks compute the result; this one needs its shape.
    """

    latents: torch.Tensor
    rest: Mapping[str, Any]
    context: ForwardContext
    on_other_ranks: bool = False

    def but(self, **changes: Any) -> ForwardCall:
        """A copy with other values."""
        return replace(self, **changes)

    def of_patch(
        self, patch: int | None, latents: torch.Tensor, rows: Literal["all", "patch", "none"] = "all"
    ) -> ForwardCall:
        """The call for one patch of the picture.

        Args:
            patch: its index, None for the whole picture.
            latents: at full shape.
            rows: which of them are true, see ``ForwardContext.latents``.
        """
        return replace(self, latents=latents, context=self.context.but(patch=patch, latents=rows))


RunForward = Callable[[ForwardCall], torch.Tensor]

MOST_LAYOUTS = 32  # that are remembered


class ForwardPoint:
    """Replaces ``denoiser.forward``.

    Args:
        rank: this rank.
        name: of the denoiser in the pipeline.
        denoiser: the transformer.
        chain: wraps ``f(inner, call) -> prediction``, outermost first.
        job: what is counted over one call of the pipeline, shared by all denoisers.
        trunk: the blocks are a trunk; without one the denoiser does everything as shipped.
    """

    def __init__(
        self,
        rank: Rank,
        name: str,
        denoiser: nn.Module,
        chain: Sequence[Callable[[RunForward, ForwardCall], torch.Tensor]],
        job: JobState,
        trunk: bool = True,
    ) -> None:
        self.rank, self.spec, self.name, self.denoiser = rank, rank.spec, name, denoiser
        self._original, self._trunk, self._job = denoiser.forward, trunk, job
        self._running = rank.running
        parameters = inspect.signature(self._original).parameters
        self._names = tuple(parameters)
        config: Any = denoiser.config
        self._patch_frames, self._patch = self.spec.latents.patch_sizes(config)
        self._fixed = {k: (v, parameters[k].default) for k, v in self.spec.trunk.forced_args.items()} if trunk else {}
        self._shapes: dict[Any, tuple[torch.Size, torch.dtype]] = {}
        self._layouts: dict[TokenLayout, tuple[TokenLayout, tuple[int, ...]]] = {}  # with the cuts of the latents
        # layouts and patches for which the embedding, or the head, was seen to work on each row alone
        self._row_local: set[tuple[str, TokenLayout, int]] = set()
        self._run: RunForward = compose(chain, self.base)
        patterns = self.spec.caching.conditioning if rank.plan.patches > 1 else ()
        shared = (m for name, m in denoiser.named_modules() if any(fnmatch(name, p) for p in patterns))
        self._memoized = [Memoized(module) for module in shared]
        embeddings = self.spec.caching.embeddings if rank.plan.patches > 1 else ()
        self._embeddings = [PlaceholderEmbedding(denoiser.get_submodule(name), rank.running) for name in embeddings]
        denoiser.forward = self.forward

    def clear(self) -> None:
        """Forget what belongs to a job."""
        self._shapes.clear()
        for embedding in self._embeddings:
            embedding.clear()

    def base(self, call: ForwardCall) -> torch.Tensor:
        """Run the model's own forward. If this rank holds nothing of the result, return a tensor of its shape without
        values."""
        key, context = (call.latents.shape, call.latents.dtype), call.context
        if call.on_other_ranks:
            if key not in self._shapes:
                self._shapes[key] = self.shape_of(call)
            shape, dtype = self._shapes[key]
            return call.latents.new_empty((), dtype=dtype).expand(shape)
        call = self.with_checks(call.but(context=context.but(shape_known=key in self._shapes)))
        try:
            whole = self.original(call)
        except NothingHere:  # behind the blocks
            if call.context.check_embedding:
                self.note_row_local("embedding", call.context)
            shape, dtype = self._shapes[key]
            return call.latents.new_empty((), dtype=dtype).expand(shape)
        self._shapes[key] = (whole.shape, whole.dtype)
        self.checked(call.context, whole)
        return whole

    def original(self, call: ForwardCall) -> torch.Tensor:
        """The denoiser as shipped, its blocks being a trunk."""
        latents, before = call.latents, self._running.context
        for module in self._memoized:
            module.begin_patch()
        given: Any = list(latents.unbind(0)) if self.spec.latents.list_inputs else latents
        self._running.context = call.context
        try:
            out = self._original(**{self.spec.latents.argument: given}, **call.rest, return_dict=False)[0]
        finally:
            self._running.context = before
        whole: torch.Tensor = torch.stack(out) if self.spec.latents.list_inputs else out
        return whole

    def shape_of(self, call: ForwardCall) -> tuple[torch.Size, torch.dtype]:
        """Find shape and dtype of the prediction for these latents; embedding and head are run, the blocks are not."""
        blank = call.latents.new_zeros(call.latents.shape)
        out = self.original(call.but(latents=blank, context=call.context.but(shape_only=True)))
        return out.shape, out.dtype

    def with_checks(self, call: ForwardCall) -> ForwardCall:
        """The call; where it is the first of its patch and size, one that shows whether embedding and head work on each
        row alone.

        Patches are right only if they do. So the rows beside the patch are given no numbers: if one of these comes into
        the patch, rows are mixed.
        """
        context = call.context
        if not self._trunk or context.patch is None:
            return call
        latents = call.latents
        check_embedding = context.latents == "patch" and not self.known_row_local("embedding", context)
        if check_embedding:
            top, bottom = context.latent_rows
            latents = torch.full_like(call.latents, torch.nan)
            latents.narrow(context.row_dim, top, bottom - top).copy_(
                call.latents.narrow(context.row_dim, top, bottom - top)
            )
        check_head = None if self.known_row_local("head", context) else HeadCheck()
        return call.but(latents=latents, context=context.but(check_embedding=check_embedding, check_head=check_head))

    def known_row_local(self, part: str, context: ForwardContext) -> bool:
        """The embedding, or the head, was seen to work on each row alone for a patch of this size."""
        return (part, context.layout, context.patch) in self._row_local

    def note_row_local(self, part: str, context: ForwardContext) -> None:
        """It passed its check."""
        if context.patch is not None:
            self._row_local.add((part, context.layout, context.patch))

    def checked(self, context: ForwardContext, prediction: torch.Tensor) -> None:
        """Note that the embedding or the head passed its check.

        Raises:
            UnsupportedCall: rows beside the patch came into it.
        """
        if context.patch is None:
            return
        if context.check_embedding:
            self.note_row_local("embedding", context)
        if context.check_head:
            top, bottom = context.latent_rows
            if context.check_head.given_nan and prediction.narrow(context.row_dim, top, bottom - top).isnan().any():
                raise UnsupportedCall(
                    f"the head of {self.name} mixes rows of the picture, so its patches cannot be computed one by one; "
                    f"run {self.spec.name} without strategies that cut the picture into patches."
                )
            self.note_row_local("head", context)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Take the place of the denoiser's own forward, with the same arguments and result."""
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        as_dict = given.pop("return_dict", True)
        for name, reason in self.spec.unsupported.items() if self._trunk else ():
            if given.get(name) is not None:
                raise UnsupportedCall(f"{self.name}({name}=...) cannot be honoured: {reason}.")
            given.pop(name, None)
        for name, (value, default) in self._fixed.items():
            if given.get(name, default) != default:
                raise UnsupportedCall(f"{self.name}({name}={given[name]}) cannot be honoured; leave it at {default}.")
            given[name] = value
        skipped = given.get(self.spec.trunk.skip_layers) if self.spec.trunk.skip_layers else None
        if self._trunk:
            given.pop(self.spec.trunk.skip_layers, None)
        latents = given.pop(self.spec.latents.argument)
        if self.spec.latents.list_inputs:
            latents = torch.stack(list(latents))
        context = self._running.context = self.context_of(latents, given, frozenset(skipped or ()))
        try:
            whole = self._run(ForwardCall(latents, given, context))
        finally:
            for module in self._memoized:
                module.clear()
        out: Any = list(whole.unbind(0)) if self.spec.latents.list_inputs else whole
        if not as_dict:
            return (out,)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=out)

    def check(self, layout: TokenLayout) -> None:
        """A request may ask for another size than the plan was checked for.

        Raises:
            UsageError: too few tokens for the patches and shards of the plan.
        """
        fix = "ask for a larger picture, or make a plan with fewer patches or ranks"
        try:
            fewest = min(length(layout.picture(m, None)) for m in range(layout.patches))
        except ValueError as error:
            raise UsageError(f"{error}; {fix}.") from error
        if fewest < layout.shards:
            raise UsageError(f"a patch of {fewest} tokens cannot be shared by {layout.shards} ranks; {fix}.")

    def grid(self, latents: torch.Tensor) -> tuple[int, int, int, int]:
        """Frames, rows and columns of tokens, and how many rows of the latents make a row of tokens.

        Raises:
            UnsupportedCall: latents of another kind than the adapter says.
        """
        frames = 1 if self.spec.latents.frame_dim is None else latents.shape[self.spec.latents.frame_dim]
        if latents.dim() == (4 if self.spec.latents.frame_dim is None else 5):
            size = self._patch
            return -(-frames // self._patch_frames), latents.shape[-2] // size, latents.shape[-1] // size, size
        rows, columns = self._job.grid
        if latents.dim() != 3 or latents.shape[1] != rows * columns:
            raise UnsupportedCall(
                f"latents of shape {tuple(latents.shape)} where [B, C, h, w] or [B, {rows} x {columns}, C] is "
                "expected; the adapter does not fit."
            )
        return 1, rows, columns, columns

    def context_of(self, latents: torch.Tensor, given: Mapping[str, Any], skipped: frozenset[int]) -> ForwardContext:
        """Work out the token layout and the branch of a call.

        Args:
            latents: as the pipeline gives them.
            given: the other arguments by name.
            skipped: blocks that are left out.

        Raises:
            UsageError: the picture is too small for the patches and shards of the plan.
            UnsupportedCall: the latents are not what the adapter says, or the branches cannot be told apart.
        """
        plan, spec, job = self.rank.plan, self.spec, self._job
        latent_frames, rows, columns, unit = self.grid(latents)
        frames = 1 if spec.trunk.stream.frames else latent_frames
        condition = given.get(spec.text.input)
        words = 0
        if spec.text.rows:
            words = spec.text.rows(given)
        elif spec.trunk.stream.text and condition is not None:
            words = condition.shape[1]
        layout = TokenLayout(
            rows=rows,
            columns=columns,
            text=words,
            weight=words,
            patches=plan.patches,
            shards=plan.shards,
            frames=frames,
            text_first=spec.trunk.stream.text_first,
            padding_tokens=spec.latents.padding_tokens(frames * rows * columns) if spec.latents.padding_tokens else 0,
            unit=plan.facts.row_unit,
        )
        if layout not in self._layouts:
            self.check(layout)
            if len(self._layouts) == MOST_LAYOUTS:
                self._layouts.clear()
            self._layouts[layout] = layout, tuple(bound * unit for bound in layout.bounds)
        layout, cuts = self._layouts[layout]  # the one that knows its rows
        return ForwardContext(
            number=job.next_call(),
            step=job.step,
            branch=job.branches.find((self.name, skipped, latents.shape[0]), condition, job.step),
            layout=layout,
            cuts=cuts,
            pictures=job.pictures,
            frames=latent_frames,
            shard=self.rank.shard,
            skipped_blocks=skipped,
        )


class Memoized:
    """Computes a submodule once for all patches of a call of the denoiser; its ``forward`` is replaced.

    The denoiser's forward runs once for each patch, in the same way each time: the k-th use of the module in one gives
    what its k-th use in the first gave. Nothing is remembered from one call to the next, so it does not matter who has
    written to what.
    """

    def __init__(self, module: nn.Module) -> None:
        self._original = module.forward
        self._results: list[Any] = []
        self._uses = 0
        module.forward = self.forward

    def clear(self) -> None:
        """Another call of the denoiser by the pipeline."""
        self._results.clear()
        self._uses = 0

    def begin_patch(self) -> None:
        """Another patch of it."""
        self._uses = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's result, that of the first patch where there is one; while a graph is being compiled nothing is
        remembered."""
        if torch.compiler.is_compiling():
            return self._original(*args, **kwargs)
        if self._uses == len(self._results):
            self._results.append(self._original(*args, **kwargs))
        self._uses += 1
        return self._results[self._uses - 1]


class PlaceholderEmbedding:
    """Does not embed latents that have no values again, on stages whose rows come from another; ``forward`` is
    replaced.

    Args:
        module: embeds the latents, its one argument.
    """

    def __init__(self, module: nn.Module, running: Running) -> None:
        self._original, self._running = module.forward, running
        self._known: tuple[Any, Any] = (None, None)
        module.forward = self.forward

    def clear(self) -> None:
        """A request is over."""
        self._known = (None, None)

    def forward(self, latents: torch.Tensor) -> Any:
        """The module's result; of a placeholder any that has its shape."""
        if self._running.context.latents != "none" or torch.compiler.is_compiling():
            return self._original(latents)
        key = (latents.shape, latents.dtype)
        if self._known[0] != key:
            self._known = (key, self._original(latents))
        return self._known[1]
