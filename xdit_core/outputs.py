"""Where results are written, and how: pictures with their settings inside, a JSON of timings beside each. Without torch."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from xdit_core.errors import UsageError
from xdit_core.settings import RunSettings

if TYPE_CHECKING:
    from xdit_core.jobs import Output
    from xdit_core.plan import Plan

RECORD = "record"  # a file of this name in the run folder asks the ranks to remember what `verify` compares
SUFFIX = MappingProxyType({"image": ".png", "video": ".mp4", "latent": ".safetensors"})
PACKAGES = ("xdit", "torch", "diffusers", "transformers")
UNTOLD = ("prompt", "prompts", "out", "runs", "trace", "profile")  # settings that do not make the picture
FPS = 16  # of a model that names no other


def slug(prompt: str) -> str:
    """A prompt as a part of a file name: ``A red fox!`` gives ``a-red-fox``."""
    return re.sub(r"[^\w]+", "-", prompt.lower()).strip("-_")[:48].rstrip("-_") or "picture"


def is_folder(out: str) -> bool:
    """``out=`` means a folder: one that exists, a name without suffix, or one that ends in a slash."""
    return out.endswith(("/", os.sep)) or Path(out).is_dir() or not Path(out).suffix


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
    out = Path(run.out).expanduser()
    if is_folder(run.out):
        names = [[f"{slug(prompt)}-{run.seed + i}" for i in range(each)] for prompt in run.prompt]
        return tuple(tuple(out / (name + suffix) for name in row) for row in without_repeats(names))
    if run.out == "out.png":  # the default serves both types of output
        out = out.with_suffix(suffix)
    if out.suffix.lower() != suffix:
        forms = {"image": "pictures are written as PNG", "video": "videos are written as MP4"}
        form = forms.get(kind, "latents are written as safetensors")
        raise UsageError(
            f"out={run.out} ends in {out.suffix} but {form}; use out={out.with_suffix(suffix)}, or a name without a dot "
            "for a folder."
        )
    if len(run.prompt) * each == 1:
        return ((out,),)
    return tuple(
        tuple(out.with_name(f"{out.stem}-{p * each + i}{out.suffix}") for i in range(each)) for p in range(len(run.prompt))
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
    """Where the contact sheet goes."""
    out = Path(run.out).expanduser()
    return out / "sheet.png" if is_folder(run.out) else out.with_name(f"{out.stem}-sheet.png")


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


def make_folder(folder: Path, setting: str, value: str) -> None:
    """Make a folder if it is not there and write a file in it for a moment.

    Raises:
        UsageError: it is not possible; names the setting.
    """
    probe = folder / f".xdit-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except (FileExistsError, NotADirectoryError) as error:
        blocking = next((p for p in (folder, *folder.parents) if p.exists() and not p.is_dir()), folder)
        raise UsageError(
            f"{setting}={value} cannot be written: {blocking} is a file, not a folder; choose another place with {setting}=."
        ) from error
    except OSError as error:
        raise UsageError(
            f"{setting}={value} cannot be written: {folder}: {error.strerror}; choose another place with {setting}=."
        ) from error


@contextlib.contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """A temporary path that becomes ``path`` if the block goes through: nobody ever reads half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def describe(plan: Plan) -> dict[str, Any]:
    """What made a result: plugins, axes and settings, as JSON."""
    run = plan.run
    return {
        "model": plan.model,
        "plugins": {name: " ".join(origin) for name, origin in plan.plugins.items()},
        "axes": {a.name: a.degree for a in plan.axes},
        "blocks per stage": list(plan.split),
        "patches": plan.patches,
        "displaced": list(plan.displaced),
        "settings": {k: v for k, v in plan.values.items() if k not in UNTOLD},
        "steps": run.steps,
        "guidance": run.guidance,
        "height": run.height,
        "width": run.width,
        **({"frames": run.frames, "fps": run.fps or FPS} if plan.facts.video else {}),
        "digest": plan.digest(),
    }


def versions() -> dict[str, str]:
    """Versions of the packages that decide what a picture looks like."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def readable(prompt: str, seed: int, plan: Plan) -> str:
    """The settings in the form that picture tools show as ``parameters``."""
    run = plan.run
    lines = [prompt]
    if run.negative:
        lines.append(f"Negative prompt: {run.negative}")
    items = {"Steps": run.steps, "CFG scale": run.guidance, "Seed": seed, "Size": f"{run.width}x{run.height}"}
    items |= {"Model": plan.model, "Sampler": run.scheduler, "Plugins": " ".join(plan.plugins) or None}
    lines.append(", ".join(f"{k}: {v}" for k, v in items.items() if v is not None))
    return "\n".join(lines)


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


def save(output: Output, i: int, path: Path, about: Mapping[str, Any], text: str, fps: int) -> None:
    """Picture ``i`` as PNG, video ``i`` as MP4, or all latents as safetensors.

    Inside are the settings, not the timings: same run, same bytes. A PNG holds JSON as ``xdit`` and ``text`` as ``parameters``;
    the comment of an MP4 is ``text``, and the JSON as its last line.
    """
    settings = json.dumps(about)
    if output.latents is not None:
        from safetensors.torch import save_file

        save_file({"latents": output.latents.detach().cpu().contiguous()}, str(path), metadata={"xdit": settings})
        return
    if output.images is None:
        raise ValueError("this rank does not own the output")
    from PIL.PngImagePlugin import PngInfo

    if isinstance(output.images[i], list):
        from xdit_core.video import write_video

        write_video(output.images[i], path, fps, f"{text}\n{settings}")
        return
    info = PngInfo()
    info.add_text("xdit", settings)
    info.add_text("parameters", text)
    save_png: Callable[..., None] = output.images[i].save
    save_png(path, format="PNG", pnginfo=info)


__all__ = ["check_writable", "make_folder", "targets", "write", "write_sheet"]
