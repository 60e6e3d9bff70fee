"""Results are written: pictures with their settings inside, a JSON of timings beside each, a contact sheet of all. Without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xdit_core.embedded import FPS, describe, readable, save, versions
from xdit_core.errors import UsageError
from xdit_core.filesystem import atomically, make_folder
from xdit_core.result_names import sheet_path
from xdit_core.settings import RunSettings

if TYPE_CHECKING:
    from xdit_core.jobs import Output
    from xdit_core.plan import Plan

RECORD = "record"  # a file of this name in the run folder asks the ranks to remember what `verify` compares


def check_writable(run: RunSettings, files: Sequence[Sequence[Path]]) -> None:
    """Make the folders of the results and try to write there, so that an hour's work is not lost at its end.

    Raises:
        UsageError: it is not possible; says where and why.
    """
    for path in (path for row in files for path in row):
        if path.is_dir():
            raise UsageError(f"out={run.out}: {path} is a folder; choose another file name.")
    for folder in sorted({path.parent for row in files for path in row}):
        make_folder(folder, "out", run.out)


def write(output: Output, paths: Sequence[Path], plan: Plan, seconds: Mapping[str, float], **more: Any) -> None:
    """Write what one prompt gave: each picture and its JSON, whole or not at all.

    Args:
        output: from ``Engine.generate`` on the owner.
        paths: where the pictures of the output go, or its latents.
        seconds: timings by phase.
        more: further entries of the JSON.

    Raises:
        OSError: the disk is full or the folder has gone.
    """
    common = {"prompt": output.prompt, "plan": describe(plan), "versions": versions()}
    for i, path in enumerate(paths):
        seed = plan.run.seed + output.numbers[i]
        about = {**common, "seed": seed}
        with atomically(path) as temporary:
            save(output, i, temporary, about, readable(output.prompt, seed, plan), plan.run.fps or FPS)
        timings = {name: round(value, 4) for name, value in seconds.items()}
        with atomically(path.with_suffix(".json")) as temporary:
            text = json.dumps({"file": path.name, **about, "seconds": timings, **more}, indent=1, ensure_ascii=False)
            temporary.write_text(text + "\n", encoding="utf-8")


def write_sheet(run: RunSettings, files: Sequence[Sequence[Path]]) -> str:
    """Put everything that was written onto one picture, from the files: on another machine's disk they may be missing.

    Returns:
        A line for the user, also if it failed: the pictures are there, and the run went well. "" if there is nothing to put together.
    """
    if run.output_type != "image" or sum(map(len, files)) < 2:
        return ""
    path, count = sheet_path(run), sum(map(len, files))
    try:
        from xdit_core.sheet import MOST, contact_sheet

        sheet, absent = contact_sheet(files, run.prompt)
        with atomically(path) as temporary:
            sheet.save(temporary, format="PNG")
    except Exception as error:
        why = (error.strerror if isinstance(error, OSError) else None) or f"{type(error).__name__}: {error}"
        return f"{path} was not written: {why}; the pictures are there."
    line = f"{path}  the contact sheet"
    if count > MOST:
        line += f" of the first {MOST} of {count}"
    if absent:
        line += f", without {', '.join(p.name for p in absent[:3])}{f' and {len(absent) - 3} more' if absent[3:] else ''}: not here or not readable"
    return line
