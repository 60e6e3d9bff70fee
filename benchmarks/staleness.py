"""What staleness costs on trained weights: PipeFusion's (patches, warmup) against the serial pipeline.

The displaced result does not depend on the number of stages, so one process computes it. Writes
``docs/measured/staleness.md`` and ``docs/pictures/staleness.png``.

    python benchmarks/staleness.py --count 50
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from xdit_core import Engine, make_plan
from xdit_emoji.training.data import chosen_names, load
from xdit_emoji.training.evaluate import questions, score, serial, to_tensor

PATCHES, WARMUPS = (2, 4, 8), (1, 2, 4)
NOTE = """Warm-up makes no difference of a tenth of a decibel here. The first steps are mostly noise, in which
neighbouring patches say little about each other, and what staleness costs comes from the later steps. For one
picture with M=8, the largest difference of the latents is 0.098 between W=1 and serial, and 0.001 between W=1
and W=4. This model has 64 tokens and has memorized its pictures, so it says little about models that compose
new ones; for those, choose W by looking at the pictures."""
HEAD = """The bundled emoji model under PipeFusion, 20 steps, {names} names drawn at random with fixed seeds. PSNR
compares the displaced picture with the serial one of the same seed. Retrieval says how often the nearest
training picture is the one that was named. Made by `python benchmarks/staleness.py --count {count}`."""
SHOWN = ("red heart", "fox", "pizza", "rocket", "octopus", "grinning face", "sunflower", "guitar")


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Peak signal-to-noise ratio of two uint8 pictures, in dB."""
    error = (a.float() - b.float()).pow(2).mean().clamp_min(1e-9)
    return float(10 * torch.log10(255**2 / error))


def picture(engine: Engine, name: str, seed: int) -> torch.Tensor:
    """uint8 ``[3, h, w]``."""
    images = engine.generate(name, seed=seed).images
    if images is None:
        raise RuntimeError("this rank does not own the output")
    return to_tensor(images[0])


def grid(rows: list[tuple[str, list[torch.Tensor]]], path: Path) -> None:
    """Pictures in rows with a label at the left."""
    side, margin = rows[0][1][0].shape[-1], 110
    out = Image.new("RGB", (margin + side * len(rows[0][1]), side * len(rows)), "white")
    pen = ImageDraw.Draw(out)
    for y, (label, pictures) in enumerate(rows):
        pen.text((6, y * side + side // 2 - 8), label, fill="black", font_size=16)
        for x, p in enumerate(pictures):
            out.paste(Image.fromarray(p.permute(1, 2, 0).contiguous().numpy()), (margin + x * side, y * side))
    out.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=50, help="names asked")
    parser.add_argument("--pipeline", default=None)
    parser.add_argument("--out", default="docs")
    args = parser.parse_args()
    names, pictures = load(chosen_names())
    asked, shown = questions(names, args.count), [(n, 7) for n in SHOWN if n in names]
    base = serial(args.pipeline)
    truth = {q: picture(base, *q) for q in [*asked, *shown]}
    right, _ = score(lambda n, s: truth[n, s], names, pictures, asked)
    lines = [
        "# What staleness costs",
        "",
        HEAD.format(names=len(asked), count=args.count),
        "",
        "| patches M | warm-up W | PSNR mean (dB) | PSNR worst (dB) | retrieval |",
        "|---|---|---|---|---|",
        f"| serial | | | | {right} of {len(asked)} |",
    ]
    rows = [("serial", [truth[q] for q in shown])]
    for m in PATCHES:
        for w in WARMUPS:
            started = time.monotonic()
            values = {"model": "emoji", "pipefusion.stages": 1, "pipefusion.patches": m, "pipefusion.warmup": w}
            engine = Engine(
                make_plan(["pipefusion"], {**values, **({"model.path": args.pipeline} if args.pipeline else {})})
            )
            got = {q: picture(engine, *q) for q in [*asked, *shown]}
            quality = [psnr(got[q], truth[q]) for q in asked]
            right, _ = score(lambda n, s, got=got: got[n, s], names, pictures, asked)  # type: ignore[misc]
            lines.append(
                f"| {m} | {w} | {sum(quality) / len(quality):.1f} | {min(quality):.1f} | {right} of {len(asked)} |"
            )
            rows.append((f"M={m} W={w}", [got[q] for q in shown]))
            print(lines[-1], f"{time.monotonic() - started:.0f} s", flush=True)
    lines += ["", NOTE, "", "![Serial and displaced pictures](../pictures/staleness.png)", ""]
    out = Path(args.out)
    (out / "measured" / "staleness.md").write_text("\n".join(lines), encoding="utf-8")
    grid(rows, out / "pictures" / "staleness.png")


if __name__ == "__main__":
    main()
