"""The page of models and strategies, made from the parity tests.

python tests/helpers/models/table.py --write
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

from helpers.models.families import FAMILIES
from helpers.models.matrix import DISPLACED, EXACT, ODD, cases

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


def cell(name: str, column: str) -> str:
    """How many combinations with a strategy are compared with the serial run, and with the displaced reference."""
    if column not in FAMILIES[name].strategies:
        return ""
    counts = [sum(c.values[0] == name and column in t[c.values[1]][0] for c in cases(t)) for t in (EXACT, DISPLACED)]
    counts[0] += column in ("cfg", "parallel_vae")  # decoded together
    return ", ".join(f"{n} {word}" for n, word in zip(counts, ("serial", "displaced"), strict=True) if n)


def lines_of(package: str) -> int:
    """Lines of Python in an adapter's package, of those that are there for diffusers' models."""
    return sum(
        len(p.read_text(encoding="utf-8").splitlines()) for p in (ROOT / "models" / f"xdit_{package}").glob("*.py")
    )


def page() -> str:
    """The page as Markdown."""
    out = [
        "# Models and strategies",
        "",
        "Made from the tests by `python tests/helpers/models/table.py --write`. Every tiny pipeline consists of "
        "the real diffusers and transformers classes with",
        "random weights, is saved to disk and loaded through the public path. Compared are latents in float32, to "
        "1e-5 of the largest value: *serial*, with",
        "the unmodified diffusers pipeline; *displaced*, with the same schedule in one process. Without a plugin, and "
        "in warm-up, the latents are those of",
        "diffusers bit for bit. A cell counts the combinations with that strategy that are compared; an empty one "
        "means that the architecture has nothing",
        "for it to divide, and the plan refuses it. Of near relatives a few are run; of SD3 and PixArt-Sigma "
        "`tests/combos` runs all singles, pairs and",
        "triples.",
        "",
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
        (DISPLACED, "its schedule in one process, warm-up of 1 step (some: 0 too)"),
    ):
        for label, (plugins, settings, world) in table.items():
            shown = " ".join([f"`{','.join(plugins)}`", *(f"`{k}={v}`" for k, v in settings.items())])
            out.append(f"| {label} | {shown} | {world} | {oracle} |")
    out += [
        "| decoded | `cfg,parallel_vae` | 2 | pictures of one process, to 1 of 255; CogVideoX with diffusers' own "
        "tiles |",
        "",
        "Three steps, two pictures or videos, guidance on. The published configurations "
        "(`tests/models/published.json`) are built without weights:",
        "every block is found, 2 to 8 stages are balanced to one block, the numbers of parameters are those that were "
        "published, the sizes that",
        "users ask for pass the plan.",
        "",
        "## Lines",
        "",
        "| | lines here | lines of xDiT for this model alone |",
        "|---|---|---|",
    ]
    out += [f"| {name} | {lines_of(name)} | {count:,} |" for name, count in XDIT.items()]
    out.append(f"| sum | {sum(map(lines_of, XDIT))} | {sum(XDIT.values()):,} |")
    others = ("dit", "qwen_image", "z_image", "sdxl")
    out += [f"| {name} | {lines_of(name)} | |" for name in others]
    out += [
        "",
        "Latte has a second file: a module that runs a spatial and a temporal block as one, as the loop of its "
        "denoiser does.",
    ]
    return "\n".join(out) + "\n"


if __name__ == "__main__":
    if "--write" in sys.argv:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        print(page())
