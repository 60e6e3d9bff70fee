"""Make typed settings from words ``key=value``. Values are taken verbatim: ``prompt=yes`` is the word *yes*."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
import secrets
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xdit_core.errors import PlanRefused, PluginError, UsageError
from xdit_core.filesystem import user_path
from xdit_core.records import Problem

CALL = "call."
COLLECTED = ("prompt", "class", "lora")
YES = ("true", "yes", "on", "1")
NO = ("false", "no", "off", "0")
SETTING_TYPES = (int, float, bool, str, tuple[int, ...], tuple[str, ...])
MOST_NUMBERS = 10_000  # of a range
MOST_SCALE = 100.0  # of a LoRA
STUCK = 600.0  # seconds without progress after which a run counts as stuck, if the user gave no timeout=


@dataclass(frozen=True)
class RunSettings:
    """The settings of every run, whatever plugins are chosen. None stands for the model's or machine's default."""

    prompt: tuple[str, ...] = field(default=(), metadata={"help": "what to draw; give it again for more prompts"})
    prompts: str | None = field(
        default=None,
        metadata={"help": "a text file with one prompt on each line, # for comments; - for standard input"},
    )
    negative: str | None = field(default=None, metadata={"help": "what to keep out of the picture"})
    steps: int | None = field(default=None, metadata={"help": "denoising steps"})
    guidance: float | None = field(default=None, metadata={"help": "classifier-free guidance scale"})
    height: int | None = field(default=None, metadata={"help": "pixels"})
    width: int | None = field(default=None, metadata={"help": "pixels"})
    class_: tuple[str, ...] = field(
        default=(), metadata={"help": "number or name of a class, for models that draw classes; give it again for more"}
    )
    frames: int | None = field(default=None, metadata={"help": "frames of a video"})
    fps: int | None = field(default=None, metadata={"help": "frames per second of a video file"})
    images: int = field(default=1, metadata={"help": "pictures or videos for each prompt"})
    seed: tuple[int, ...] = field(
        default=(0,),
        metadata={
            "help": "seed of the noise: 5 (the next picture has 6), one for each picture as 1..8 or 3,5,9, or random"
        },
    )
    out: str = field(default="out.png", metadata={"help": "a file, or a folder for several pictures"})
    overwrite: bool | None = field(
        default=None,
        metadata={
            "help": "replace files that are there; default: results of earlier runs, and nothing else; no: nothing"
        },
    )
    resume: bool = field(
        default=False, metadata={"help": "keep results that are there with the same settings, draw the rest"}
    )
    output_type: str = field(default="image", metadata={"help": "image or latent (a safetensors file)"})
    dtype: str | None = field(default=None, metadata={"help": "float32, bfloat16 or float16"})
    device: str | None = field(default=None, metadata={"help": "cpu or cuda"})
    threads: int | None = field(default=None, metadata={"help": "CPU threads of each process"})
    nproc: int | None = field(default=None, metadata={"help": "number of processes"})
    lora: tuple[str, ...] = field(
        default=(), metadata={"help": "PATH[:scale] of a LoRA to add to the weights; give it again for more"}
    )
    scheduler: str | None = field(default=None, metadata={"help": "a diffusers scheduler class instead of the model's"})
    max_sequence_length: int | None = field(default=None, metadata={"help": "the most text tokens of the T5 encoder"})
    timeout: float | None = field(
        default=None,
        metadata={
            "help": "seconds without progress that end a run; default: 600, between steps ten times the longest "
            "pause, at least 20"
        },
    )
    trace: bool = field(default=False, metadata={"help": "write what every rank did and when into the run folder"})
    profile: bool = field(default=False, metadata={"help": "trace, with torch's profiler on every rank"})
    record: bool = field(
        default=False, metadata={"help": "write what every block computed into the run folder, for verify"}
    )
    lockstep: bool = field(
        default=False,
        metadata={"help": "compare what the ranks do before each collective; slow, for authors of plugins"},
    )
    runs: str = field(default="runs", metadata={"help": "folder for logs; each run makes a folder in it"})
    keep_runs: int = field(default=20, metadata={"help": "how many of these folders are kept; 0: all"})

    def seed_of(self, number: int) -> int:
        """Seed of a picture of a prompt: of those that were given, or counted from the one that was."""
        return self.seed[number] if len(self.seed) > 1 else self.seed[0] + number

    @property
    def patience(self) -> float:
        """Seconds without progress after which anything counts as stuck."""
        return STUCK if self.timeout is None else self.timeout


# Shared settings that change nothing of what is computed.
SIDE_SETTINGS = (
    "prompts",
    "out",
    "overwrite",
    "resume",
    "nproc",
    "timeout",
    "trace",
    "profile",
    "record",
    "runs",
    "keep_runs",
    "lockstep",
)


@dataclass(frozen=True)
class ModelSettings:
    """Where the checkpoint comes from (``model.path=`` ...)."""

    path: str | None = field(default=None, metadata={"help": "a folder in diffusers format or a hub id"})
    revision: str | None = field(default=None, metadata={"help": "branch, tag or commit on the hub"})
    download_dir: str | None = field(
        default=None, metadata={"help": "where downloads are kept; default: the hub's own cache"}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "let the checkpoint bring Python code that runs here"}
    )


def parse_words(words: Iterable[str]) -> dict[str, Any]:
    """Parse words ``key=value`` into a flat mapping; the keys of ``COLLECTED`` may be repeated, all others may not.

    Raises:
        UsageError: a word without ``=``, an empty key, a key given twice.
    """
    values: dict[str, Any] = {}
    for word in words:
        key, sign, value = word.partition("=")
        key = key.strip()
        if not sign or not key:
            raise UsageError(f"cannot read {word!r}; settings are written key=value, such as steps=20.")
        if key in COLLECTED:
            values.setdefault(key, []).append(value)
        elif key in values:
            raise UsageError(f"{key} is given twice; keep one of {key}={values[key]} and {key}={value}.")
        else:
            values[key] = value
    return values


def call_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings ``call.NAME=value`` for the ``__call__`` of the pipeline, as written; `typed_call` converts them."""
    return {key.removeprefix(CALL): value for key, value in values.items() if key.startswith(CALL)}


def lora_texts(value: Any) -> tuple[str, ...]:
    """Texts ``PATH[:scale]`` from one text, several, or a mapping from path to scale.

    Raises:
        UsageError: it is none of these, or a scale is no number.
    """
    if isinstance(value, Mapping):
        return tuple(f"{path}:{lora_scale(f'lora={path}', scale)!r}" for path, scale in value.items())
    texts = (value,) if isinstance(value, (str, Path)) else value
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, (str, Path)) for text in texts):
        raise UsageError(f"lora={value!r:.60} is no LoRA; write PATH, PATH:0.8 or {{PATH: 0.8}}.")
    return tuple(map(str, texts))


def lora_scale(what: str, scale: Any) -> float:
    """The scale of a LoRA.

    Args:
        what: has it, for the message.

    Raises:
        UsageError: it is no number, or too large to make sense.
    """
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not -MOST_SCALE <= scale <= MOST_SCALE:
        given = str(scale)[:40] if isinstance(scale, (str, int, float)) else f"a {type(scale).__name__}"
        raise UsageError(f"{what} has the scale {given}; give a number from -{MOST_SCALE:g} to {MOST_SCALE:g}.")
    return float(scale)


def parse_loras(texts: Iterable[str]) -> dict[str, float]:
    """Parse texts ``PATH[:scale]`` into path and scale.

    Raises:
        PlanRefused: no such file or folder, one that is given twice, or a scale that makes no sense.
    """
    scales: dict[str, float] = {}
    for text in texts:
        path, _, number = text.rpartition(":")
        try:
            scale = float(number) if path else 1.0
        except ValueError:
            path, scale = text, 1.0
        path = os.path.abspath(user_path(path or text, "lora="))  # links stay: what they lead to may have no suffix
        if not Path(path).exists():
            fix = "give a file or folder, with a scale behind it such as PATH:0.8"
            raise PlanRefused([Problem(f"lora={text}: there is no {path}", fix)])
        if path in scales:
            raise PlanRefused([Problem(f"lora={text}: {path} is given twice", "keep one of them")])
        scales[path] = lora_scale(f"lora={text}", scale)
    return scales


def convert(key: str, value: Any, kind: Any) -> Any:
    """Convert a value, which is a string or already typed, to a type.

    Raises:
        UsageError: it cannot be read as that type.
    """
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None or value == "none":
            return None
        return convert(key, value, next(o for o in options if o is not types.NoneType))
    if origin is tuple:
        inner = options[0]
        if inner is str:
            return (value,) if isinstance(value, str) else tuple(str(v) for v in value)
        parts = (
            value.split(",")
            if isinstance(value, str)
            else value
            if isinstance(value, (list, tuple, range))
            else (value,)
        )
        return tuple(
            number for part in parts for number in (numbers(key, part) if inner is int else [convert(key, part, inner)])
        )
    if isinstance(value, (list, tuple, dict)):
        raise UsageError(f"{key} takes one value and was given {len(value)}; write for example {key}={example(kind)}.")
    try:
        if kind is bool:
            if isinstance(value, bool):
                return value
            if str(value).lower() not in YES + NO:
                raise ValueError
            return str(value).lower() in YES
        if kind is int:
            return int(str(value).strip())
        if kind is float:
            number = float(str(value).strip())
            if number != number or number in (float("inf"), float("-inf")):
                raise ValueError
            return number
        return str(value)
    except ValueError:
        words = {int: "a whole number", float: "a number", bool: "yes or no"}.get(kind, kind.__name__)
        raise UsageError(f"{key}={value} is not {words}; write for example {key}={example(kind)}.") from None


def numbers(key: str, part: Any) -> Iterable[int]:
    """Parse one part of a list of whole numbers: ``5``, or ``1..8`` for all from 1 to 8.

    Raises:
        UsageError: it is neither, or there are more than ``MOST_NUMBERS``.
    """
    first, dots, last = part.partition("..") if isinstance(part, str) else (part, "", "")
    low = convert(key, first, int)
    if not dots:
        return (low,)
    high = convert(key, last, int)
    if not low <= high < low + MOST_NUMBERS:
        raise UsageError(f"{key}={part} is not a range of 1 to {MOST_NUMBERS} numbers; write for example {key}=1..8.")
    return range(low, high + 1)


def without_random(values: Mapping[str, Any]) -> dict[str, Any]:
    """Replace ``seed=random`` by a number, which all processes then know."""
    return {**values, "seed": secrets.randbelow(2**32)} if values.get("seed") == "random" else dict(values)


def example(kind: Any) -> str:
    """An example of a value of a type, for a message."""
    return {int: "2", float: "3.5", bool: "yes"}.get(kind, "text")


def fields_of(settings: type[Any] | None) -> dict[str, Any]:
    """The types of the settings of a class by name; a field whose name is a word of Python ends in an underscore."""
    known: Any = settings
    return {} if known is None else dict(_fields_of(known))


@functools.cache  # finding the types takes long beside a small request
def _fields_of(settings: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(settings)
    return {f.name.rstrip("_"): hints[f.name] for f in dataclasses.fields(settings)}


def check_class(settings: Any, plugin: str) -> None:
    """Refuse a settings class that cannot be used.

    Raises:
        PluginError: it is not a dataclass, a field has no default, or a type cannot be found.
    """
    try:
        for name, kind in fields_of(settings).items():
            options = [
                o for o in (typing.get_args(kind) if not isinstance(kind, type) else (kind,)) if o is not types.NoneType
            ]
            options = [kind] if typing.get_origin(kind) is tuple else options
            if len(options) != 1 or options[0] not in SETTING_TYPES:
                raise TypeError(
                    f"{name} is a {kind}; a setting is an int, float, bool, str, tuple[int, ...] or tuple[str, ...], "
                    "or None"
                )
        settings()
    except Exception as error:
        raise PluginError(
            f"the settings class of plugin {plugin} cannot be used: {type(error).__name__}: {error}."
        ) from error


def build(settings: type[Any] | None, prefix: str, values: Mapping[str, Any]) -> Any:
    """Make an instance of a settings class from the keys that start with ``prefix``, None if there is no class."""
    if settings is None:
        return None
    kinds = fields_of(settings)
    fields = {f.name.rstrip("_"): f.name for f in dataclasses.fields(settings)}
    return settings(
        **{fields[n]: convert(prefix + n, values[prefix + n], k) for n, k in kinds.items() if prefix + n in values}
    )


def check_keys(
    values: Mapping[str, Any], known: Mapping[str, type[Any] | None], unselected: Mapping[str, str] | None = None
) -> list[UsageError]:
    """Errors for unknown keys.

    Args:
        values: the flat settings.
        known: prefix (``""``, ``"usp."``) to settings class.
        unselected: names of installed plugins that were not selected, each with its distribution.
    """
    valid = ["model", *(prefix + name for prefix, cls in known.items() for name in fields_of(cls))]
    errors = []
    for key in values:
        owner = key.split(".")[0] if "." in key else ""
        if key in valid or key.startswith(CALL):
            continue
        if owner and owner in (unselected or {}):
            errors.append(
                UsageError(f"{key} belongs to the plugin {owner}, which is not selected; add it: --plugins {owner}.")
            )
        else:
            value = values[key]
            text = isinstance(value, str) and " " in f"{key}={value}".strip()
            drawn = f' To draw these words, write prompt="{key}={value}".' if text else ""
            errors.append(UsageError(f"unknown setting {key}; {did_you_mean(key, valid)}{drawn}"))
    return errors


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """A text such as ``did you mean X?``, or the list of what exists."""
    options = sorted(options)
    close = difflib.get_close_matches(word, options, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]}?"
    return f"known are {', '.join(options)}." if options else "none is installed."
