"""Names of the files that a run writes. Without torch."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, count
from pathlib import Path
from types import MappingProxyType

from xdit_core.errors import UsageError
from xdit_core.filesystem import user_path
from xdit_core.outputs.metadata import embedded_settings, is_json_of
from xdit_core.settings import RunSettings

SUFFIX = MappingProxyType({"image": ".png", "video": ".mp4", "latent": ".safetensors"})


def slug(prompt: str) -> str:
    """Turn a prompt into a part of a file name: ``A red fox!`` becomes ``a-red-fox``."""
    return re.sub(r"[^\w]+", "-", prompt.lower()).strip("-_")[:48].rstrip("-_") or "picture"


def is_folder(out: str) -> bool:
    """Return whether ``out=`` means a folder: an existing one, a name without suffix, or one that ends in a slash."""
    return out.endswith(("/", os.sep)) or os.path.isdir(user_path(out, "out=")) or not Path(out).suffix


def targets(run: RunSettings, video: bool = False) -> tuple[tuple[Path, ...], ...]:
    """List the files that a run writes: for each prompt one for each picture, or one with all latents.

    Args:
        video: the model makes videos.

    Raises:
        UsageError: the suffix of ``out=`` does not fit.
    """
    kind = "video" if video and run.output_type == "image" else run.output_type
    suffix = SUFFIX[kind]
    each = run.images if run.output_type == "image" else 1
    out = user_path(run.out, "out=")
    if is_folder(run.out):
        names = [[f"{slug(prompt)}-{run.seed_of(i)}" for i in range(each)] for prompt in run.prompt]
        return tuple(tuple(out / (name + suffix) for name in row) for row in without_repeats(names))
    if run.out == "out.png":  # the default name gets the suffix of the output type
        out = out.with_suffix(suffix)
    if out.suffix.lower() != suffix:
        forms = {"image": "pictures are written as PNG", "video": "videos are written as MP4"}
        form = forms.get(kind, "latents are written as safetensors")
        raise UsageError(
            f"out={run.out} ends in {out.suffix} but {form}; use out={out.with_suffix(suffix)}, or a name without a "
            "dot for a folder."
        )
    if len(run.prompt) * each == 1:
        return ((out,),)
    return tuple(
        tuple(out.with_name(f"{out.stem}-{p * each + i}{out.suffix}") for i in range(each))
        for p in range(len(run.prompt))
    )


def without_repeats(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """Make names unique: a name that occurred before gets ``-2``, ``-3`` and so on."""
    taken: set[str] = set()
    seen: dict[str, int] = {}  # the last number used for each name, which saves trying all smaller ones
    result: list[list[str]] = []
    for row in rows:
        result.append([])
        for name in row:
            n = seen.get(name, 0) + 1
            while (free := name if n == 1 else f"{name}-{n}") in taken:
                n += 1
            seen[name] = n
            taken.add(free)
            result[-1].append(free)
    return result


def sheet_path(run: RunSettings) -> Path:
    """Return the path of the contact sheet: a free name, or that of an earlier contact sheet."""
    out = user_path(run.out, "out=")
    names = chain(("sheet",), (f"sheet-{n}" for n in count(2)))
    folder = is_folder(run.out)
    paths = (out / f"{name}.png" if folder else out.with_name(f"{out.stem}-{name}.png") for name in names)
    return first_free(paths, lambda path: embedded_settings(path) is not None)


def json_path(result: Path) -> Path:
    """Return the path of a result's JSON: ``fox.json``, or ``fox.png.json`` if xdit did not write that."""
    usual = (result.with_suffix(".json").name, f"{result.name}.json")
    names = chain(usual, (f"{result.name}-{n}.json" for n in count(2)))
    return first_free((result.with_name(name) for name in names), lambda path: is_json_of(path, result))


def first_free(paths: Iterable[Path], is_ours: Callable[[Path], bool]) -> Path:
    """Return the first path that is free or that xdit wrote."""
    return next(path for path in paths if not os.path.lexists(path) or is_ours(path))


def has_sheet(run: RunSettings, files: Iterable[Sequence[Path]]) -> bool:
    """Return whether a contact sheet is made, which is so for several pictures."""
    return run.output_type == "image" and sum(map(len, files)) > 1


def all_files(run: RunSettings, files: Sequence[Sequence[Path]]) -> list[Path]:
    """List every file that a run would now write outside of its run folder."""
    paths = [path for row in files for result in row for path in (result, json_path(result))]
    return [*paths, sheet_path(run)] if has_sheet(run, files) else paths
