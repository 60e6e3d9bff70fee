"""Which strategies are compared on which models."""

from __future__ import annotations

import pytest

from helpers.models.families import FAMILIES

USP = {"usp.ulysses": 2, "usp.ring": 1}
EXACT = {
    "usp-ulysses": (["usp"], USP, 2),
    "usp-ring": (["usp"], {"usp.ulysses": 1, "usp.ring": 3}, 3),
    "usp-both": (["usp"], {"usp.ulysses": 2, "usp.ring": 2}, 4),
    "tp": (["tp"], {"tp.degree": 2}, 2),
    "tp+usp": (["tp", "usp"], {"tp.degree": 2, **USP}, 4),
    "dp": (["dp"], {"dp.degree": 2}, 2),
    "cfg": (["cfg"], {}, 2),
    "cfg+usp": (["cfg", "usp"], USP, 4),
    "cfg+tp": (["cfg", "tp"], {"tp.degree": 2}, 4),
    "compile": (["compile"], {"compile.backend": "eager"}, 1),
    "flash+usp": (["flash", "usp"], {"flash.kernel": "math", **USP}, 2),
    "compile+usp": (["compile", "usp"], {"compile.backend": "eager", **USP}, 2),
}
DISPLACED = {
    "pipefusion-2": (["pipefusion"], {"pipefusion.stages": 2}, 2),
    "pipefusion-4": (["pipefusion"], {"pipefusion.stages": 4}, 4),
    "pipefusion+usp": (["pipefusion", "usp"], {"pipefusion.stages": 2, **USP}, 4),
    "pipefusion+tp": (["pipefusion", "tp"], {"pipefusion.stages": 2, "tp.degree": 2}, 4),
    "cfg+pipefusion": (["cfg", "pipefusion"], {"pipefusion.stages": 2}, 4),
    "distrifusion": (["distrifusion"], {"distrifusion.degree": 3}, 3),
    "distrifusion+usp": (["distrifusion", "usp"], {"distrifusion.degree": 2, "usp.ulysses": 1, "usp.ring": 2}, 4),
    "cfg+distrifusion": (["cfg", "distrifusion"], {"distrifusion.degree": 2}, 4),
}

BRIEF = ("usp-both", "cfg+tp", "dp", "compile+usp", "flash+usp", "pipefusion+usp", "pipefusion+tp", "cfg+distrifusion")
WARMUPS = {"pipefusion-2": [0, 1], "distrifusion": [0, 1]}


# `dp` and the kernels of `flash` are compared once for each kind of model, not for each model: `dp` sees how a pipeline
# takes several pictures, and a kernel sees queries, keys, values and masks, which relatives have in common.
BY_KIND = ("dp", "flash+usp")
LIKE = {
    "sd3": "flux",
    "qwen_image": "flux",
    "pixart_alpha": "hunyuandit",
    "pixart_sigma": "hunyuandit",
    "cogvideox-5b": "cogvideox-2b",
    "cogvideox-1.5": "cogvideox-2b",
    "wan-2.2": "wan-2.1",
    "wan-5b": "wan-2.1",
    "z_image": "z_image-masked",
}


def cases(table):
    """Family and combination, where all of its strategies fit the family."""
    for name, family in FAMILIES.items():
        for label, (plugins, *_) in table.items():
            if label in BY_KIND and name in LIKE:
                continue
            if set(plugins) <= set(family.strategies) and (label in BRIEF or not family.brief):
                yield pytest.param(name, label, id=f"{name}-{label}")


ODD = {"wan": (48, 16), "hunyuandit": (112, 80)}
ODD |= dict.fromkeys(
    ("sd3", "flux", "qwen_image", "z_image"), (28, 20)
)  # 7 x 5 tokens; others take multiples of 8 only
