"""Write and read results with their settings inside: PNG, MP4 and safetensors. Only writing latents needs torch."""

from __future__ import annotations

import contextlib
import json
import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from xdit_core.plan import Plan
    from xdit_core.points.request import Output

PACKAGES = ("xdit", "torch", "diffusers", "transformers")
UNTOLD = (
    "prompt",
    "prompts",
    "out",
    "overwrite",
    "resume",
    "runs",
    "keep_runs",
    "lockstep",
    "model.download_dir",
    "trace",
    "profile",
)  # settings that do not influence the picture
TEXTS = ("negative", "class")  # settings whose values are never paths
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
OF_THE_RUN = (
    "images",
    "seed",
    "timeout",
)  # settings that do not influence a single picture; its own seed is stored apart
KEY = "xdit"  # of the settings in a PNG and a safetensors file
FORMAT = "xdit result"  # marks a JSON file as written by xdit
MOST_JSON = 2**22  # most bytes of a JSON file that are read to see whether xdit wrote it
FPS = 16  # frames per second, unless the model has another default


def describe(plan: Plan) -> dict[str, Any]:
    """Describe what made a result, as JSON: plugins, axes and settings.

    Pictures are shown to others, so files and folders are named by the last part of their path only. Fingerprints tell
    whether two of them have the same content.
    """
    run = plan.run
    return {
        "model": plan.model,
        "plugins": {name: " ".join(origin) for name, origin in plan.plugins.items()},
        "axes": {a.name: a.degree for a in plan.axes},
        "blocks per stage": list(plan.split),
        "patches": plan.patches,
        "fidelity": dict(plan.fidelity),
        "settings": {k: without_folders(k, v) for k, v in plan.values.items() if k not in UNTOLD},
        "checkpoint": plan.checkpoint,
        "loras": list(plan.facts.loras),
        "steps": run.steps,
        "guidance": run.guidance,
        "height": run.height,
        "width": run.width,
        **({"frames": run.frames, "fps": run.fps or FPS} if plan.facts.video else {}),
        "digest": plan.digest(),
    }


def without_folders(key: str, value: Any) -> Any:
    """Shorten the value of a setting for others to see: paths to their last part; hub ids stay as they are.

    Args:
        key: the setting.
        value: its value; values inside lists, mappings and JSON are shortened too.
    """
    if isinstance(value, (list, tuple)):
        return [without_folders(key, item) for item in value]
    if isinstance(value, dict):
        return {name: without_folders(key, item) for name, item in value.items()}
    if isinstance(value, os.PathLike):
        return Path(value).name
    if not isinstance(value, str) or key in TEXTS:
        return value
    if key == "lora":
        path, _, scale = value.rpartition(":")
        with contextlib.suppress(ValueError):
            return f"{Path(path).name}:{float(scale):g}" if path else Path(value).name
        return Path(value).name
    if key == "model.path":
        return value if HUB_ID.fullmatch(value) else os.path.basename(os.path.abspath(os.path.expanduser(value)))
    if value.startswith(("{", "[")):
        with contextlib.suppress(ValueError, RecursionError):
            return json.dumps(without_folders(key, json.loads(value)))
    return Path(value).name if value.startswith(("/", "~")) else value


def versions() -> dict[str, str]:
    """Return the versions of the packages that influence a picture."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def readable(prompt: str, seed: int, plan: Plan) -> str:
    """Format the settings as text, in the form that picture tools show as ``parameters``."""
    run = plan.run
    lines = [prompt]
    if run.negative:
        lines.append(f"Negative prompt: {run.negative}")
    items = {"Steps": run.steps, "CFG scale": run.guidance, "Seed": seed, "Size": f"{run.width}x{run.height}"}
    items |= {"Model": plan.model, "Sampler": run.scheduler, "Plugins": " ".join(plan.plugins) or None}
    lines.append(", ".join(f"{k}: {v}" for k, v in items.items() if v is not None))
    return "\n".join(lines)


def save(output: Output, i: int, path: Path, inside: Mapping[str, Any], text: str, fps: int) -> None:
    """Write picture ``i`` as PNG, video ``i`` as MP4, or all latents as safetensors.

    The file holds the settings and not the timings, so that equal runs give equal bytes. A PNG has the settings as JSON
    under ``xdit`` and ``text`` under ``parameters``. The comment of an MP4 is ``text``, and the JSON as its last line.
    """
    settings = json.dumps(inside)
    if output.latents is not None:
        from safetensors.torch import save_file

        save_file({"latents": output.latents.detach().cpu().contiguous()}, str(path), metadata={KEY: settings})
        return
    if output.images is None:
        raise ValueError("this rank does not own the output")
    from PIL.PngImagePlugin import PngInfo

    if isinstance(output.images[i], list):
        from xdit_core.outputs.video import write_video

        write_video(output.images[i], path, fps, f"{text}\n{settings}")
        return
    info = PngInfo()
    info.add_text(KEY, settings)
    info.add_text("parameters", text)
    save_png: Callable[..., None] = output.images[i].save
    save_png(path, format="PNG", pnginfo=info)


def about(plan: Plan, prompt: str, seed: int) -> dict[str, Any]:
    """Return what is written into the result of one prompt and seed, for JSON."""
    return {"prompt": prompt, "plan": describe(plan), "versions": versions(), "seed": seed}


def same_result(embedded: Mapping[str, Any] | None, wanted: Mapping[str, Any]) -> bool:
    """Return whether a file with the embedded settings holds what a run with the wanted ones would draw."""
    return embedded is not None and comparable(embedded) == comparable(json.loads(json.dumps(wanted)))


def comparable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return those embedded settings that influence what the result looks like."""
    plan = settings.get("plan")
    if not isinstance(plan, Mapping) or not isinstance(plan.get("settings"), Mapping):
        return {}
    own = {k: v for k, v in plan["settings"].items() if k not in OF_THE_RUN + UNTOLD}
    return {**settings, "plan": {**{k: v for k, v in plan.items() if k != "digest"}, "settings": own}}


def embedded_settings(path: Path) -> dict[str, Any] | None:
    """Read the settings from a PNG, MP4 or safetensors file; None if xdit did not write it, or if it does not exist."""
    read = {".png": text_of_png, ".mp4": text_of_video, ".safetensors": text_of_tensors}.get(path.suffix.lower())
    if read is None or not path.is_file():
        return None
    try:
        settings = json.loads(read(path))
    except (OSError, ValueError, RecursionError, struct.error):
        return None
    return settings if isinstance(settings, dict) else None


def text_of_png(path: Path) -> str:
    """Read the text ``xdit`` of a PNG, "" if it has none. Only the chunks before the pixels are read."""
    with path.open("rb") as file:
        if file.read(8) != b"\x89PNG\r\n\x1a\n":
            return ""
        for kind, data in chunks(file):
            name, _, text = data.partition(b"\0")
            if kind == b"tEXt" and name == KEY.encode():
                return text.decode("latin-1")
    return ""


def chunks(file: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    """Yield kind and data of the chunks of a PNG that precede its pixels."""
    while len(head := file.read(8)) == 8:
        size, kind = struct.unpack(">I4s", head)
        if kind in (b"IDAT", b"IEND") or size > MOST_JSON:
            return
        yield kind, file.read(size)
        file.read(4)


def text_of_tensors(path: Path) -> str:
    """Read the metadata ``xdit`` of a safetensors file, "" if it has none."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size)) if size <= MOST_JSON else None
    more = header.get("__metadata__") if isinstance(header, dict) else None
    text = more.get(KEY, "") if isinstance(more, dict) else ""
    return text if isinstance(text, str) else ""


def text_of_video(path: Path) -> str:
    """Read the last line of the comment of an MP4."""
    from xdit_core.outputs.video import comment_of

    return comment_of(path).rpartition("\n")[2]


def is_json_of(path: Path, result: Path) -> bool:
    """Return whether a run has written this JSON file beside a result of that name."""
    try:
        if not path.is_file() or path.stat().st_size > MOST_JSON:
            return False
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(entries, dict) and entries.get("format") == FORMAT and entries.get("file") == result.name
