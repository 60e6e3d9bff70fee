"""Write results: pictures, a JSON of timings beside each, and a contact sheet. Without torch."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xdit_core.errors import UsageError
from xdit_core.filesystem import atomically, behind_links, blaming, check_folder, check_names
from xdit_core.outputs.metadata import FORMAT, FPS, KEY, about, embedded_settings, readable, same_result, save
from xdit_core.outputs.names import all_files, first_free, has_sheet, json_path, sheet_path, targets
from xdit_core.records import join_words
from xdit_core.settings import RunSettings

if TYPE_CHECKING:
    from xdit_core.plan import Plan
    from xdit_core.points.request import Output

SOME = 5  # most files that a message names


def check_writable(plan: Plan) -> None:
    """Check before the run that its results can be written, without writing anything.

    Raises:
        UsageError: an impossible name, a folder in the way, a file that must not be replaced, or no permission; says
            where and why.
    """
    run, files = plan.run, targets(plan.run, plan.facts.video)
    given, paths = f"out={run.out}", [path for row in files for path in row]
    check_names(all_files(run, files), given)
    for path in paths:
        if path.is_dir():
            raise UsageError(f"{given}: {path} is a folder; choose another file name.")
    for folder in sorted({path.parent for path in paths}):
        check_folder(folder, given, "out")
    for path in filter(Path.is_symlink, paths):
        check_link(path, given)
    check_replaced(run, files, finished(plan, files) if run.resume else frozenset())


def check_link(path: Path, given: str) -> None:
    """Check that the target of a symbolic link can be written.

    Raises:
        UsageError: it cannot be written.
    """
    try:
        target = behind_links(path)
    except OSError as error:
        raise UsageError(f"{given} cannot be written: {path}: {error.strerror}; choose another file name.") from error
    check_folder(target.parent, given, "out")


def check_replaced(run: RunSettings, files: Sequence[Sequence[Path]], kept: Collection[Path]) -> None:
    """Check that no file is replaced that the user wants to keep.

    Args:
        kept: results that stay as they are.

    Raises:
        UsageError: lists the files.
    """
    there = [path for path in existing(files) if path not in kept]
    if run.overwrite is False and there:
        raise UsageError(
            f"overwrite=no and {some(there)} {'is' if len(there) == 1 else 'are'} there; choose another place with "
            "out=, or draw only what is missing with resume=yes."
        )
    if run.overwrite is None and (foreign := [path for path in there if embedded_settings(path) is None]):
        raise UsageError(
            f"{some(foreign)} {'is' if len(foreign) == 1 else 'are'} there and not written by xdit; choose another "
            "place with out=, or replace with overwrite=yes."
        )


def existing(files: Iterable[Iterable[Path]]) -> list[Path]:
    """List the results that exist and are not empty."""
    return [path for row in files for path in row if path.is_file() and path.stat().st_size]


def some(paths: Sequence[Path]) -> str:
    """Name a few of the files, and the number of the others, for a message."""
    return join_words(
        [str(path) for path in paths] if len(paths) <= SOME else [*paths[: SOME - 1], f"{len(paths) - SOME + 1} more"]
    )


def finished(plan: Plan, files: Sequence[Sequence[Path]]) -> frozenset[Path]:
    """Find the results that exist with exactly the settings of this plan inside."""
    finished_paths, common = set(), about(plan, "", 0)
    for prompt, row in zip(plan.run.prompt, files, strict=True):
        for i, path in enumerate(row):
            if path.is_file() and same_result(
                embedded_settings(path), {**common, "prompt": prompt, "seed": plan.run.seed_of(i)}
            ):
                finished_paths.add(path)
    return frozenset(finished_paths)


def write(
    output: Output,
    i: int,
    path: Path,
    plan: Plan,
    seconds: Mapping[str, float],
    beside: Path | None = None,
    **more: Any,
) -> None:
    """Write one picture or video of a prompt, or its latents, and a JSON beside it; each file whole or not at all.

    Args:
        output: what ``Engine.generate`` returned on the rank that owns it.
        i: number of the picture in the output; 0 for latents.
        path: the file; its folder is made if necessary.
        seconds: seconds of each phase.
        beside: path of the JSON; None means `json_path`.
        more: further entries of the JSON.

    Raises:
        OSError: the disk is full, or the folder cannot be made. The error names the file.
    """
    seed = plan.run.seed_of(output.numbers[i])
    inside = about(plan, output.prompt, seed)
    with blaming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with atomically(path) as temporary:
        save(output, i, temporary, inside, readable(output.prompt, seed, plan), plan.run.fps or FPS)
    timings = {name: round(value, 4) for name, value in seconds.items()}
    entries = {"format": FORMAT, "file": path.name, **inside, "seconds": timings, **more}
    with atomically(beside or json_path(path)) as temporary:
        temporary.write_text(json.dumps(entries, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_elsewhere(
    output: Output, i: int, path: Path, plan: Plan, seconds: Mapping[str, float], run_folder: Path
) -> Path:
    """Write a result, whose own path failed, into the run folder or the system's temporary folder.

    Returns:
        The path, whose name was free there.

    Raises:
        OSError: neither folder has room.
    """
    places = (run_folder, Path(tempfile.gettempdir()))
    for place in places:
        path_elsewhere = first_free(
            (place / f"{n}{path.name}" for n in chain(("",), (f"{n}-" for n in count(2)))), lambda path: False
        )
        try:
            write(output, i, path_elsewhere, plan, seconds)
        except OSError:
            if place == places[-1]:
                raise
            continue
        break
    return path_elsewhere


def write_sheet(run: RunSettings, files: Sequence[Sequence[Path]]) -> str:
    """Write the contact sheet from the result files; some may lie on the disk of another machine.

    Returns:
        A line for the user, "" if there is no sheet to make. If the sheet fails, the line says so; the pictures exist,
        so the run still succeeds.
    """
    if not has_sheet(run, files):
        return ""
    path, pictures = sheet_path(run), sum(map(len, files))
    try:
        from PIL.PngImagePlugin import PngInfo

        from xdit_core.outputs.contact_sheet import MOST, contact_sheet

        sheet, absent = contact_sheet(files, run.prompt, [run.seed_of(i) for i in range(run.images)])
        info = PngInfo()
        info.add_text(KEY, json.dumps({"sheet": [path.name for row in files for path in row][:MOST]}))
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomically(path) as temporary:
            sheet.save(temporary, format="PNG", pnginfo=info)
    except Exception as error:
        why = (error.strerror if isinstance(error, OSError) else None) or f"{type(error).__name__}: {error}"
        return f"{path} was not written: {why}; the pictures are there."
    line = f"{path}  the contact sheet"
    if pictures > MOST:
        line += f" of the first {MOST} of {pictures}"
    if absent:
        line += (
            f", without {', '.join(p.name for p in absent[:3])}{f' and {len(absent) - 3} more' if absent[3:] else ''}: "
            "not here or not readable"
        )
    return line
