"""The page of models and strategies, made from the parity tests.

``python tests/helpers/models/table.py --write`` writes the page, and the number of lines that the README quotes.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

from helpers.models.families import FAMILIES
from helpers.models.matrix import DISPLACED, EXACT, LIKE, ODD, cases

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "measured" / "models.md"
COLUMNS = ("usp", "pipefusion", "distrifusion", "tp", "cfg", "dp", "compile", "flash", "parallel_vae")
XDIT = {  # lines of the files that are there for a model alone: pipeline, transformer, attention, scheduler
    "sd3": 1151,
    "flux": 2021,
    "pixart": 915,
    "hunyuandit": 1210,
    "latte": 631,
    "cogvideox": 575,
    "wan": 1398,
}


HEAD = """# Models and strategies

Made from the tests by `python tests/helpers/models/table.py --write`. Each model is a tiny pipeline of the real
diffusers and transformers classes with random weights, which is saved to disk and loaded as users load
theirs. The tests compare latents in float32, within 1e-5 of the largest value:

- *serial*: with the unmodified diffusers pipeline;
- *displaced*: with the same schedule in one process.

Without a plugin, and in warm-up, the latents are those of diffusers bit for bit. A cell counts the
combinations with that strategy that are compared. An empty cell means that the model has nothing for the
strategy to divide; such a plan is refused. Of models that are alike, only one runs all combinations;
"as flux" stands where only the relative is compared. `tests/combos` also runs every strategy and pair for
SD3 and PixArt-Sigma, and every triple for one of the two.
"""
NOTE = """Each case takes three steps and two pictures or videos, with guidance.

The published configurations of all models (`tests/models/published.json`) are built without weights. The
tests check that every block is found, that 2 to 8 stages differ by one block at most, that the numbers of
parameters are the published ones, and that the usual sizes of pictures pass the plan.

## Lines
"""


def cell(name: str, column: str) -> str:
    """How many combinations with a strategy are compared with the serial run, and with the displaced reference."""
    if column not in FAMILIES[name].strategies:
        return ""
    counts = [sum(c.values[0] == name and column in t[c.values[1]][0] for c in cases(t)) for t in (EXACT, DISPLACED)]
    counts[0] += column in ("cfg", "parallel_vae")  # decoded together
    told = ", ".join(f"{n} {word}" for n, word in zip(counts, ("serial", "displaced"), strict=True) if n)
    return told or f"as {LIKE[name]}"


def lines_of(package: str) -> int:
    """Lines of Python in an adapter's package, of those that are there for diffusers' models."""
    return sum(
        len(p.read_text(encoding="utf-8").splitlines()) for p in (ROOT / "models" / f"xdit_{package}").glob("*.py")
    )


def page() -> str:
    """The page as Markdown."""
    out = [
        HEAD,
        "| model | " + " | ".join(f"`{c}`" for c in COLUMNS) + " | another scheduler | odd size | without guidance |",
        "|---" * (len(COLUMNS) + 4) + "|",
    ]
    for name, family in FAMILIES.items():
        odd = ODD.get(family.model, (32, 40)) if "usp" in family.strategies and family.model != "dit" else None
        cells = [cell(name, column) for column in COLUMNS]
        scheduler = "" if family.brief else f"`{family.scheduler}`"
        more = [scheduler, f"{odd[1]} x {odd[0]}" if odd else "", "yes" if family.plain else ""]
        out.append(f"| {name} | " + " | ".join([*cells, *more]) + " |")
    out += [
        "",
        "## What is run",
        "",
        "| combination | plugins and settings | processes | compared with |",
        "|---|---|---|---|",
    ]
    for table, oracle in (
        (EXACT, "serial"),
        (DISPLACED, "its schedule in one process, with a warm-up of 1 step, and of 0 in some cases"),
    ):
        for label, (plugins, settings, world) in table.items():
            shown = " ".join([f"`{','.join(plugins)}`", *(f"`{k}={v}`" for k, v in settings.items())])
            out.append(f"| {label} | {shown} | {world} | {oracle} |")
    out += [
        "| decoded | `cfg,parallel_vae` | 2 | pictures of one process, to 1 of 255; for CogVideoX with "
        "diffusers' tiles |",
        "",
        NOTE,
        "| | lines here | lines of xDiT for this model alone |",
        "|---|---|---|",
    ]
    out += [f"| {name} | {lines_of(name)} | {count:,} |" for name, count in XDIT.items()]
    out.append(f"| sum | {sum(map(lines_of, XDIT))} | {sum(XDIT.values()):,} |")
    others = ("dit", "qwen_image", "z_image", "sdxl")
    out += [f"| {name} | {lines_of(name)} | |" for name in others]
    out += [
        "",
        "Latte has a second file: a module that runs a spatial and a temporal block as one, as its denoiser does.",
    ]
    return "\n".join(out) + "\n"


if __name__ == "__main__":
    if "--write" in sys.argv:
        PAGE.write_text(page(), encoding="utf-8")
        readme = ROOT / "README.md"
        sums = re.sub(r"\d+ lines together", f"{sum(map(lines_of, XDIT))} lines together", readme.read_text("utf-8"))
        readme.write_text(sums, encoding="utf-8")
    else:
        print(page())
