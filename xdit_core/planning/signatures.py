"""Find the arguments that diffusers pipelines take, from their source text and so without torch."""

from __future__ import annotations

import ast
import functools
import json
import re
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

from xdit_core.model_spec import ModelSpec
from xdit_core.records import Problem
from xdit_core.settings import NO, YES, did_you_mean

PIPELINE_WORDS: Mapping[str, str] = MappingProxyType(
    {  # what the shared settings are called in a pipeline's ``__call__``, if the adapter does not say otherwise
        "steps": "num_inference_steps",
        "guidance": "guidance_scale",
        "negative": "negative_prompt",
        "height": "height",
        "width": "width",
        "frames": "num_frames",
        "max_sequence_length": "max_sequence_length",
        "images": "num_images_per_prompt",
        "seed": "generator",
        "output_type": "output_type",
    }
)


def argument_names(spec: ModelSpec) -> dict[str, str]:
    """Setting to argument of the pipeline's ``__call__``, "" where the pipeline takes none; the subject (``prompt``)
    included."""
    asks = spec.request
    not_taken = dict.fromkeys(asks.not_taken, "")
    return {**PIPELINE_WORDS, asks.subject: asks.subject, **asks.renamed, **not_taken}


@functools.cache
def call_signature(pipeline: str) -> Mapping[str, str] | None:
    """Name and annotation of each argument of a diffusers pipeline's ``__call__``; None if there is no such class.

    Args:
        pipeline: name of the class.
    """
    package = find_spec("diffusers")
    folder = Path(package.origin).parent / "pipelines" if package and package.origin else Path()
    head = re.compile(rf"^class {re.escape(pipeline)}\b", re.MULTILINE)
    for file in sorted(folder.rglob("pipeline_*.py")):
        text = file.read_text(encoding="utf-8")
        if f"class {pipeline}" not in text or not head.search(text):  # the expression alone is slow
            continue
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef) and node.name == pipeline:
                return next((arguments(part) for part in node.body if getattr(part, "name", "") == "__call__"), None)
    return None


def arguments(function: Any) -> dict[str, str]:
    """The arguments of a function except ``self``, each with the text of its annotation."""
    everything = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return {a.arg: ast.unparse(a.annotation) if a.annotation else "" for a in everything if a.arg != "self"}


def typed_call(spec: ModelSpec, pipeline: str, call: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """Convert the words of ``call.NAME=value`` to the types that the signature of the pipeline names.

    Args:
        pipeline: class of the checkpoint's pipeline.
        call: values by name; strings are words of a command line, anything else is taken as it is.

    Returns:
        The values, and what is wrong: unknown names, names that settings stand for, words of another type.
    """
    if not call:
        return {}, []
    known, converted, problems = call_signature(pipeline), {}, []
    owned = {argument: setting for setting, argument in argument_names(spec).items() if argument}
    for name, value in call.items():
        if name == "return_dict" or name in owned:
            by = f"write {owned[name]}= instead" if name in owned else "leave it out"
            problems.append(Problem(f"call.{name} is decided by xdit", by))
        elif known is not None and name not in known:
            problems.append(
                Problem(f"call.{name}: {pipeline} has no such argument", did_you_mean(name, known).rstrip("."))
            )
        else:
            try:
                converted[name] = typed(value, (known or {}).get(name, "")) if isinstance(value, str) else value
            except ValueError as error:
                problems.append(
                    Problem(f"call.{name}={value[:80]} is not {error}, as {pipeline} takes it", "correct the value")
                )
    return converted, problems


def typed(word: str, annotation: str) -> Any:
    """Convert a word to the type of an annotation: as JSON if that fits, else the word itself if text is allowed.

    Raises:
        ValueError: it is of no such type; says which one is wanted.
    """
    kinds = set(members(ast.parse(annotation, mode="eval").body)) if annotation else set()
    if "bool" in kinds and word.lower() in YES + NO and not kinds & {"int", "float"}:
        return word.lower() in YES
    try:
        value = json.loads(word)
    except (ValueError, RecursionError):
        value = word
    if not kinds or any(fits(value, kinds)):
        return value
    if "str" in kinds:
        return word
    wanted = [text for kind, text in NAMED.items() if kind in kinds]
    if not wanted:  # tensors, pictures, callables: only Python can make them
        raise ValueError("something that can be written on a command line")
    raise ValueError(" or ".join(wanted))


NAMED: Mapping[str, str] = MappingProxyType(
    {
        "bool": "yes or no",
        "int": "a whole number",
        "float": "a number",
        "list": "a list",
        "List": "a list",
        "dict": "a JSON object",
    }
)


def members(node: ast.expr) -> Iterator[str]:
    """The names of the types that an annotation allows: the members of a union, ``list`` of ``list[int]``."""
    if isinstance(node, ast.BinOp):
        yield from (*members(node.left), *members(node.right))
    elif isinstance(node, ast.Subscript):
        head = next(members(node.value), "")
        inside = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        yield from (name for part in inside for name in members(part)) if head in ("Union", "Optional") else (head,)
        yield from ("None",) if head == "Optional" else ()
    elif isinstance(node, ast.Constant):
        yield str(node.value)
    elif isinstance(node, (ast.Name, ast.Attribute)):
        yield node.id if isinstance(node, ast.Name) else node.attr


def fits(value: Any, kinds: set[str]) -> Iterator[bool]:
    """For each kind of value, whether the value is of that kind and the kind is allowed."""
    yield isinstance(value, bool) and "bool" in kinds
    yield isinstance(value, int) and not isinstance(value, bool) and bool(kinds & {"int", "float"})
    yield isinstance(value, float) and "float" in kinds
    yield isinstance(value, list) and bool(kinds & {"list", "List", "tuple", "Tuple", "Sequence"})
    yield isinstance(value, dict) and bool(kinds & {"dict", "Dict", "Mapping"})
    yield value is None and "None" in kinds
    yield bool(kinds & {"Any", "object"})
