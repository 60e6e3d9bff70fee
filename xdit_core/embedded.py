"""What a result says of itself: the settings inside a PNG, an MP4 or a safetensors file. Without torch until it is written."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xdit_core.jobs import Output
    from xdit_core.plan import Plan

PACKAGES = ("xdit", "torch", "diffusers", "transformers")
UNTOLD = ("prompt", "prompts", "out", "runs", "trace", "profile")  # settings that do not make the picture
FPS = 16  # of a model that names no other


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
