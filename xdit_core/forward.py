"""The forward point: one call of the denoiser, by name of argument, through the wraps of the strategies."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from xdit_core.chain import nest
from xdit_core.errors import UnsupportedCall, UsageError
from xdit_core.rank import Rank
from xdit_core.tokens import TokenLayout, length
from xdit_core.trunk import NothingHere


@dataclass(frozen=True, slots=True)
class Call:
    """One call of the denoiser.

    Args:
        latents: ``[B, C, h, w]``; may be a patch tensor.
        rest: every other argument given, by name.
        elsewhere: other ranks compute the result; only its shape is wanted here.
    """

    latents: torch.Tensor
    rest: Mapping[str, Any]
    elsewhere: bool = False

    def but(self, **changes: Any) -> Call:
        """A copy with other values."""
        return replace(self, **changes)


Run = Callable[[Call], torch.Tensor]


class Branches:
    """Tells the calls of one step with different conditions apart, by the identity of what they are conditioned on."""

    def __init__(self) -> None:
        self._known: dict[Any, Any] = {}

    def clear(self) -> None:
        """Forget those of the last request."""
        self._known.clear()

    def number(self, denoiser: str, name: str, condition: Any, skip: frozenset[int]) -> int:
        """The number of a branch, counted from 0.

        Raises:
            UnsupportedCall: there is a new condition at every step.
        """
        tensors = tree_leaves(condition)
        key = (denoiser, skip, *((id(x), x.data_ptr(), tuple(x.shape)) for x in tensors if isinstance(x, torch.Tensor)))
        if key not in self._known:
            if len(self._known) >= 16:
                raise UnsupportedCall(
                    f"the pipeline makes a new {name} at every step, so the conditions of a step cannot be told "
                    "apart; pass the same tensor at every step."
                )
            self._known[key] = tensors  # held, so that their ids stay taken
        return list(self._known).index(key)


class ForwardPoint:
    """Replaces ``denoiser.forward``.

    Args:
        rank: this rank.
        name: of the denoiser in the pipeline.
        denoiser: the transformer.
        chain: wraps ``f(inner, call) -> prediction``, outermost first.
        branches: shared by all denoisers.
        trunk: the blocks are a trunk; without one the denoiser does everything as shipped.
    """

    def __init__(
        self,
        rank: Rank,
        name: str,
        denoiser: nn.Module,
        chain: Sequence[Callable[[Run, Call], torch.Tensor]],
        branches: Branches,
        trunk: bool = True,
    ) -> None:
        self.rank, self.spec, self.name, self.denoiser = rank, rank.spec, name, denoiser
        self._original, self._trunk, self._branches = denoiser.forward, trunk, branches
        parameters = inspect.signature(self._original).parameters
        self._names = tuple(parameters)
        config: Any = denoiser.config
        self._patch_frames, self._patch = self.spec.patch_sizes(config)
        self._fixed = {k: (v, parameters[k].default) for k, v in self.spec.fixed.items()} if trunk else {}
        self._shapes: dict[Any, tuple[torch.Size, torch.dtype]] = {}
        self._run: Run = nest(chain, self.base)
        denoiser.forward = self.forward

    def begin(self) -> None:
        """Forget the shapes of the last request."""
        self._shapes.clear()

    def base(self, call: Call) -> torch.Tensor:
        """The model's own forward; where this rank holds nothing of its result, a tensor of the right shape and no values."""
        key = (call.latents.shape, call.latents.dtype)
        if call.elsewhere:
            shape, dtype = self._shapes.get(key, key)
            return call.latents.new_empty((), dtype=dtype).expand(shape)
        self.rank.now.known = key in self._shapes
        latents: Any = list(call.latents.unbind(0)) if self.spec.listed else call.latents
        try:
            out = self._original(**{self.spec.latents: latents}, **call.rest, return_dict=False)[0]
        except NothingHere:
            shape, dtype = self._shapes[key]
            return call.latents.new_empty((), dtype=dtype).expand(shape)
        whole: torch.Tensor = torch.stack(out) if self.spec.listed else out
        self._shapes[key] = (whole.shape, whole.dtype)
        return whole

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the pipeline calls; same signature and result as the denoiser's own."""
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        as_dict = given.pop("return_dict", True)
        for name, reason in self.spec.refused.items() if self._trunk else ():
            if given.get(name) is not None:
                raise UnsupportedCall(f"{self.name}({name}=...) cannot be honoured: {reason}.")
            given.pop(name, None)
        for name, (value, default) in self._fixed.items():
            if given.get(name, default) != default:
                raise UnsupportedCall(f"{self.name}({name}={given[name]}) cannot be honoured; leave it at {default}.")
            given[name] = value
        skipped = given.get(self.spec.skips) if self.spec.skips else None
        if self._trunk:
            given.pop(self.spec.skips, None)
        latents = given.pop(self.spec.latents)
        if self.spec.listed:
            latents = torch.stack(list(latents))
        self.look(latents, given, frozenset(skipped or ()))
        whole = self._run(Call(latents, given))
        out: Any = list(whole.unbind(0)) if self.spec.listed else whole
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
        frames = 1 if self.spec.frame_dim is None else latents.shape[self.spec.frame_dim]
        if latents.dim() == (4 if self.spec.frame_dim is None else 5):
            size = self._patch
            return -(-frames // self._patch_frames), latents.shape[-2] // size, latents.shape[-1] // size, size
        rows, columns = self.rank.now.grid
        if latents.dim() != 3 or latents.shape[1] != rows * columns:
            raise UnsupportedCall(
                f"latents of shape {tuple(latents.shape)} where [B, C, h, w] or [B, {rows} x {columns}, C] is expected; the adapter does not fit."
            )
        return 1, rows, columns, columns

    def look(self, latents: torch.Tensor, given: Mapping[str, Any], skip: frozenset[int]) -> None:
        """Work out the token layout and the branch of this call."""
        now, plan, spec = self.rank.now, self.rank.plan, self.spec
        now.frames, rows, columns, unit = self.grid(latents)
        frames = 1 if spec.stream.frames else now.frames
        condition = given.get(spec.text_input)
        words = 0
        if spec.text_rows:
            words = spec.text_rows(given)
        elif spec.stream.text and condition is not None:
            words = condition.shape[1]
        layout = TokenLayout(
            rows=rows,
            columns=columns,
            text=words,
            weight=words,
            patches=plan.patches,
            shards=plan.shards,
            frames=frames,
            text_first=spec.stream.text_first,
            tail=spec.tail(frames * rows * columns) if spec.tail else 0,
            unit=plan.facts.row_unit,
        )
        if layout != now.layout:
            self.check(layout)
            now.layout, now.cuts = layout, tuple(b * unit for b in layout.bounds)
        now.branch, now.skip = self._branches.number(self.name, spec.text_input, condition, skip), skip
        now.call += 1


class Once:
    """Remembers what a submodule gave for its last two keys, so that nothing is computed again that has not changed.

    Args:
        module: its ``forward`` is replaced.
        key: of the module's arguments; equal keys give equal results. While a graph is being compiled nothing is remembered.
    """

    def __init__(self, module: nn.Module, key: Callable[..., Any]) -> None:
        self._original, self._key = module.forward, key
        self._known: dict[Any, tuple[Any, Any]] = {}
        module.forward = self.forward

    def begin(self) -> None:
        """Forget."""
        self._known.clear()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's result, the old one where there is one."""
        if torch.compiler.is_compiling():
            return self._original(*args, **kwargs)
        key = self._key(*args, **kwargs)
        if key not in self._known:
            if len(self._known) == 2:
                del self._known[next(iter(self._known))]
            self._known[key] = (args, self._original(*args, **kwargs))  # the arguments are held, so that their ids stay taken
        return self._known[key][1]


def same_tensor(x: torch.Tensor) -> tuple[int, int]:
    """The key of a submodule that often gets the same tensor again."""
    return id(x), 0 if x.is_inference() else x._version


def remembering(denoiser: nn.Module, rank: Rank) -> list[Once]:
    """Put `Once` around what the adapter names: text projections, and if there are patches what all patches of a step share."""
    found = [Once(denoiser.get_submodule(name), same_tensor) for name in rank.spec.once]
    if rank.plan.patches > 1:
        shared = (m for name, m in denoiser.named_modules() if any(fnmatch(name, p) for p in rank.spec.conditioning))
        found += [Once(module, lambda *_, **__: rank.now.call) for module in shared]
    return found
