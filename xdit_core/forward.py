"""The forward point: one call of the denoiser, by name of argument, through the wraps of the strategies."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import Any

import torch
from torch import nn

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


class ForwardPoint:
    """Replaces ``denoiser.forward``.

    Args:
        rank: this rank.
        denoiser: the transformer.
        chain: wraps ``f(inner, call) -> prediction``, outermost first.
        trunk: the blocks are a trunk; without one the denoiser does everything as shipped.
    """

    def __init__(
        self, rank: Rank, denoiser: nn.Module, chain: Sequence[Callable[[Run, Call], torch.Tensor]], trunk: bool = True
    ) -> None:
        self.rank, self.spec, self.denoiser = rank, rank.spec, denoiser
        self._original, self._trunk = denoiser.forward, trunk
        self._names = tuple(inspect.signature(self._original).parameters)
        config: Any = denoiser.config
        self._patch = int(config[self.spec.patch])
        self._branches: dict[Any, torch.Tensor | None] = {}
        self._shapes: dict[Any, tuple[torch.Size, torch.dtype]] = {}
        self._run: Run = nest(chain, self.base)
        denoiser.forward = self.forward

    def begin(self) -> None:
        """Forget the branches of the last request."""
        self._branches.clear()
        self._shapes.clear()

    def base(self, call: Call) -> torch.Tensor:
        """The model's own forward; where this rank holds nothing of its result, a tensor of the right shape and no values."""
        key = (call.latents.shape, call.latents.dtype)
        if call.elsewhere:
            shape, dtype = self._shapes.get(key, key)
            return call.latents.new_empty((), dtype=dtype).expand(shape)
        self.rank.now.known = key in self._shapes
        try:
            out: torch.Tensor = self._original(**{self.spec.latents: call.latents}, **call.rest, return_dict=False)[0]
        except NothingHere:
            shape, dtype = self._shapes[key]
            return call.latents.new_empty((), dtype=dtype).expand(shape)
        self._shapes[key] = (out.shape, out.dtype)
        return out

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the pipeline calls; same signature and result as the denoiser's own."""
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        as_dict = given.pop("return_dict", True)
        for name, reason in self.spec.refused.items() if self._trunk else ():
            if given.get(name) is not None:
                raise UnsupportedCall(f"{self.spec.denoiser}({name}=...) cannot be honoured: {reason}.")
            given.pop(name, None)
        skipped = given.get(self.spec.skips) if self.spec.skips else None
        if self._trunk:
            given.pop(self.spec.skips, None)
        latents = given.pop(self.spec.latents)
        self.look(latents, given, frozenset(skipped or ()))
        out = self._run(Call(latents, given))
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

    def grid(self, latents: torch.Tensor) -> tuple[int, int, int]:
        """Rows and columns of tokens, and how many rows of the latents make a row of tokens.

        Raises:
            UnsupportedCall: latents of another kind than the adapter says.
        """
        if latents.dim() == 4:
            return latents.shape[-2] // self._patch, latents.shape[-1] // self._patch, self._patch
        rows, columns = self.rank.now.grid
        if latents.dim() != 3 or latents.shape[1] != rows * columns:
            raise UnsupportedCall(
                f"latents of shape {tuple(latents.shape)} where [B, C, h, w] or [B, {rows} x {columns}, C] is expected; the adapter does not fit."
            )
        return rows, columns, columns

    def look(self, latents: torch.Tensor, given: Mapping[str, Any], skip: frozenset[int]) -> None:
        """Work out the token layout and the branch of this call."""
        now, plan = self.rank.now, self.rank.plan
        rows, columns, unit = self.grid(latents)
        text = given.get(self.spec.text_input)
        words = text.shape[1] if self.spec.stream.text and text is not None else 0
        layout = TokenLayout(
            rows=rows,
            columns=columns,
            text=words,
            patches=plan.patches,
            shards=plan.shards,
            text_first=self.spec.stream.text_first,
        )
        if layout != now.layout:
            self.check(layout)
            now.layout, now.cuts = layout, tuple(b * unit for b in layout.bounds)
        key = (None if text is None else (id(text), text.data_ptr(), tuple(text.shape)), skip)
        if key not in self._branches:
            if len(self._branches) >= 16:
                raise UnsupportedCall(
                    f"the pipeline makes a new {self.spec.text_input} at every step, so the conditions of a step cannot be told "
                    "apart; pass the same tensor at every step."
                )
            self._branches[key] = text  # held, so that its id stays taken
        now.branch, now.skip, now.call = list(self._branches).index(key), skip, now.call + 1


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
