"""Checks whether an adapter fits the class of the denoiser, before any weights are read.

The denoiser is as diffusers made it; its parameters may have shapes and no values. What a block returns is checked when
it first runs.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatch
from typing import Any

import torch
from torch import nn

from xdit_core.errors import ModelError
from xdit_core.model_spec import Blocks, ModelSpec, Stream
from xdit_core.settings import did_you_mean

KINDS = ("joint", "self", "cross")  # of attention calls
PARTS = ("tokens", "text")  # of what a block returns


def check_adapter(spec: ModelSpec, denoiser: nn.Module) -> None:
    """Compare everything that an adapter says of a denoiser with its class.

    Raises:
        ModelError: names the adapter, the first field that is wrong, and what the class has.
    """
    first = next(mistakes(spec, denoiser), None)
    if first is not None:
        raise misfit(spec, denoiser, *first)


def misfit(spec: ModelSpec, module: nn.Module, field: str, value: object, what: str) -> ModelError:
    """The error for a field of an adapter that does not fit a module."""
    owner = spec.owner or f"adapter {spec.name}"
    end = "" if what.endswith(("?", ".")) else "."
    return ModelError(f"{owner} does not fit {type(module).__name__}: {field}={value!r} {what}{end}")


Mistake = tuple[str, object, str]  # field, its value, what is wrong with it


def mistakes(spec: ModelSpec, denoiser: nn.Module) -> Iterator[Mistake]:
    """The fields that are wrong, in order; each check relies on those before it, so only the first one counts."""
    yield from wrong_arguments(arguments_of_forward(spec), denoiser)
    for i, part in enumerate(spec.trunk.blocks):
        yield from wrong_blocks(spec, denoiser, part, f"trunk.blocks[{i}]")
    names = {name for name, _ in denoiser.named_modules()}
    if spec.trunk.tp_plan is not None and not spec.trunk.tp_plan and not getattr(denoiser, "_tp_plan", None):
        yield "trunk.tp_plan", {}, "stands for the plan of the class, which has no _tp_plan; name its linear layers"
    patterns = {
        "trunk.tp_plan": spec.trunk.tp_plan or (),
        "caching.embeddings": spec.caching.embeddings,
        "caching.conditioning": spec.caching.conditioning,
    }
    for field, listed in patterns.items():
        yield from wrong_names(field, listed, names)
    if spec.trunk.blocks:
        first = getattr(denoiser, spec.trunk.blocks[0].attribute)[0]
        inside = {name for name, _ in first.named_modules()}
        yield from wrong_names("trunk.shared_submodules", spec.trunk.shared_submodules, inside)
        yield from wrong_skips(spec, sum(len(getattr(denoiser, part.attribute)) for part in spec.trunk.blocks))


def arguments_of_forward(spec: ModelSpec) -> Iterator[tuple[str, str]]:
    """Field and value for each argument of the denoiser's forward that an adapter names."""
    yield "latents.argument", spec.latents.argument
    yield "text.input", spec.text.input
    yield "trunk.skip_layers", spec.trunk.skip_layers
    yield from (("trunk.forced_args", name) for name in spec.trunk.forced_args)
    yield from (("unbatched_args", name) for name in spec.unbatched_args)
    yield from (("unsupported", name) for name in spec.unsupported)


def arguments_of_block(stream: Stream, made: bool) -> Iterator[tuple[str, str]]:
    """Field and value for each argument of a block that a stream names.

    Args:
        made: the adapter makes the module that runs as a block, which then takes the frames.
    """
    yield "tokens", stream.tokens
    yield "text", stream.text
    yield "skip", stream.skip
    if not made:
        yield "frames", stream.frames
    for field in ("image_aligned", "text_aligned", "joint_aligned"):
        yield from ((f"{field}[{i}].argument", item.argument) for i, item in enumerate(getattr(stream, field)))


def wrong_arguments(named: Iterable[tuple[str, str]], module: nn.Module) -> Iterator[Mistake]:
    """Return the arguments that a module's forward does not have; "" stands for none."""
    parameters = inspect.signature(module.forward).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return  # it passes on arguments that its signature does not name
    for field, name in named:
        if name and name not in parameters:
            yield field, name, f"is no argument of {type(module).__name__}.forward; {did_you_mean(name, parameters)}"


def wrong_blocks(spec: ModelSpec, denoiser: nn.Module, part: Blocks, path: str) -> Iterator[Mistake]:
    """What is wrong with the description of a block list.

    Args:
        path: the field of the adapter that describes it.
    """
    lists = {name: module for name, module in denoiser.named_children() if isinstance(module, nn.ModuleList)}
    for field, name in ((f"{path}.attribute", part.attribute), *((f"{path}.beside", name) for name in part.beside)):
        if name not in lists:
            yield field, name, f"is no list of blocks; {did_you_mean(name, lists)}"
            return
    length, config = len(lists[part.attribute]), getattr(denoiser, "config", {})
    if config.get(part.count) != length:
        fitting = [key for key, value in config.items() if value == length and not isinstance(value, bool)]
        has = f"is {config[part.count]!r} in its config" if part.count in config else "is no key of its config"
        keys = f"; {length} is the value of {', '.join(sorted(fitting))}" if fitting else ""
        yield f"{path}.count", part.count, f"{has}, and {part.attribute} has {length} blocks{keys}"
    for name in part.beside:
        if len(lists[name]) != length:
            yield f"{path}.beside", name, f"has {len(lists[name])} blocks, and {part.attribute} has {length}"
    stream = spec.trunk.stream_of(part)
    where = stream_field(spec, stream)
    named = ((f"{where}.{field}", name) for field, name in arguments_of_block(stream, part.make is not None))
    yield from wrong_arguments(named, lists[part.attribute][0])
    unknown = [name for name in stream.returns if name not in PARTS]
    if unknown or stream.returns.count("tokens") != 1:
        what = did_you_mean(unknown[0], PARTS) if unknown else "does not name tokens, which every block returns"
        yield f"{where}.returns", stream.returns, f"has {unknown[0]!r}; {what}" if unknown else what
    if "text" in stream.returns and not stream.text:
        yield f"{where}.returns", stream.returns, f"has text, and {where}.text names no argument that takes it"


def stream_field(spec: ModelSpec, stream: Stream) -> str:
    """The field of an adapter that holds a stream."""
    own = [i for i, part in enumerate(spec.trunk.blocks) if part.stream == stream]
    return f"trunk.blocks[{own[0]}].stream" if own else "trunk.stream"


def wrong_names(field: str, patterns: Iterable[str], names: set[str]) -> Iterator[Mistake]:
    """Return the patterns that match no name of a submodule."""
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in names):
            known = {re.sub(r"\.\d+\b", ".*", name) for name in names if name}
            yield field, pattern, f"names no submodule; {nearest(pattern, known)}"


def nearest(pattern: str, names: set[str]) -> str:
    """``did you mean X?``, or what to do: the names of all submodules would fill a page."""
    text = did_you_mean(pattern, names)
    return text if text.startswith("did you mean") else "correct it, or leave it out"


def wrong_skips(spec: ModelSpec, blocks: int) -> Iterator[Mistake]:
    """Long skip connections between blocks that do not exist, or that no argument takes."""
    if spec.trunk.long_skips is None:
        return
    skips = dict(spec.trunk.long_skips(blocks))
    for taker, giver in skips.items():
        if not 0 <= giver < taker < blocks:
            yield "trunk.long_skips", skips, f"leads from block {giver} to block {taker} of {blocks}"
    if not spec.trunk.stream.skip:
        yield "trunk.long_skips", skips, "needs trunk.stream.skip, the argument that takes the tokens"


def check_made(spec: ModelSpec, part: Blocks, block: nn.Module) -> None:
    """A module that an adapter made to run as one block takes the arguments that it is given.

    Raises:
        ModelError: it does not; names the adapter and the argument.
    """
    stream = spec.trunk.stream_of(part)
    where, named = stream_field(spec, stream), arguments_of_block(stream, made=False)
    for field, value, what in wrong_arguments(((f"{where}.{field}", name) for field, name in named), block):
        raise misfit(spec, block, field, value, what)


def attention_kinds(spec: ModelSpec, block: nn.Module) -> tuple[str, ...]:
    """The kinds of the attention calls of a block.

    Raises:
        ModelError: the adapter names a kind that does not exist.
    """
    kinds = spec.trunk.attention(block)
    for kind in kinds:
        if kind not in KINDS:
            raise misfit(spec, block, "trunk.attention", kinds, f"has {kind!r}; {did_you_mean(str(kind), KINDS)}")
    return kinds


def check_returned(
    spec: ModelSpec, stream: Stream, block: nn.Module, returned: Sequence[Any], tokens: torch.Tensor
) -> None:
    """A block returned as many values as its stream says, among them one with the rows of the tokens.

    Args:
        tokens: what the block was given.

    Raises:
        ModelError: it did not; names the adapter.
    """
    field = f"{stream_field(spec, stream)}.returns"
    if len(returned) != len(stream.returns):
        count = f"{len(returned)} value{'s' if len(returned) != 1 else ''}"
        raise misfit(spec, block, field, stream.returns, f"names {len(stream.returns)}, and the block returned {count}")
    value = returned[stream.returns.index("tokens")]
    if not isinstance(value, torch.Tensor) or value.shape[:2] != tokens.shape[:2]:
        has = f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"type {type(value).__name__}"
        what = f"names tokens where the block returned a value of {has}, and tokens of {tuple(tokens.shape)} were given"
        raise misfit(spec, block, field, stream.returns, what)
