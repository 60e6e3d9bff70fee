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
from xdit_core.planning.settings import RunSettings

SUFFIX = MappingProxyType({"image": ".png", "video": ".mp4", "latent": ".safetensors"})


def slug(prompt: str) -> str:
    """A prompt as a part of a file name: ``A red fox!`` gives ``a-red-fox``."""
    return re.sub(r"[^\w]+", "-", prompt.lower()).strip("-_")[:48].rstrip("-_") or "picture"


def is_folder(out: str) -> bool:
    """``out=`` means a folder: one that exists, a name without suffix, or one that ends in a slash."""
    return out.endswith(("/", os.sep)) or os.path.isdir(user_path(out, "out=")) or not Path(out).suffix


def targets(run: RunSettings, video: bool = False) -> tuple[tuple[Path, ...], ...]:
    """The files that a run writes: for each prompt one for each picture, or one that holds the latents of all.

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
    if run.out == "out.png":  # the default serves both types of output
        out = out.with_suffix(suffix)
    if out.suffix.lower() != suffix:
        forms = {"image": "pictures are written as PNG", "video": "videos are written as MP4"}
        form = forms.get(kind, "latents are written as safetensors")
        raise UsageError(
            f"out={run.out} ends in {out.suffix} but {form}; use out={out.with_suffix(suffix)}, or a name without a "
            f"dot "
            "for a folder."
        )
    if len(run.prompt) * each == 1:
        return ((out,),)
    return tuple(
        tuple(out.with_name(f"{out.stem}-{p * each + i}{out.suffix}") for i in range(each))
        for p in range(len(run.prompt))
    )


def without_repeats(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """The names, with ``-2``, ``-3`` ... after a name that occurred before."""
    taken: set[str] = set()
    seen: dict[str, int] = {}  # so that a thousand repetitions are not tried a thousand times each
    result: list[list[str]] = []
    for row in rows:
        result.append([])
        for name in row:
            n = seen.get(name, 0) + 1
            while (found := name if n == 1 else f"{name}-{n}") in taken:
                n += 1
            seen[name] = n
            taken.add(found)
            result[-1].append(found)
    return result


def sheet_path(run: RunSettings) -> Path:
    """Where the contact sheet goes: a name that is free, or that of an earlier one."""
    out = user_path(run.out, "out=")
    names = chain(("sheet",), (f"sheet-{n}" for n in count(2)))
    folder = is_folder(run.out)
    paths = (out / f"{name}.png" if folder else out.with_name(f"{out.stem}-{name}.png") for name in names)
    return first_free(paths, lambda path: embedded_settings(path) is not None)


def json_path(result: Path) -> Path:
    """Where the JSON of a result goes: ``fox.json``, or ``fox.png.json`` and so on where that belongs to somebody
    else."""
    usual = (result.with_suffix(".json").name, f"{result.name}.json")
    names = chain(usual, (f"{result.name}-{n}.json" for n in count(2)))
    return first_free((result.with_name(name) for name in names), lambda path: is_json_of(path, result))


def first_free(paths: Iterable[Path], is_ours: Callable[[Path], bool]) -> Path:
    """The first path that is free or ours."""
    return next(path for path in paths if not os.path.lexists(path) or is_ours(path))


def has_sheet(run: RunSettings, files: Iterable[Sequence[Path]]) -> bool:
    """There are several pictures, so that a contact sheet shows them."""
    return run.output_type == "image" and sum(map(len, files)) > 1


def all_files(run: RunSettings, files: Sequence[Sequence[Path]]) -> list[Path]:
    """Every file that a run writes outside of its run folder, as things are now."""
    found = [path for row in files for result in row for path in (result, json_path(result))]
    return [*found, sheet_path(run)] if has_sheet(run, files) else found
