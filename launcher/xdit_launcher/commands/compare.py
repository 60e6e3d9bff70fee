"""How far two runs are apart: of latents, pictures and the rows behind every block. With numpy, without torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

WINDOW, SIGMA = 11, 1.5  # of the structural similarity


def records(folder: Path) -> dict[int, Mapping[str, Array]]:
    """What each rank recorded (see ``xdit_core.observe.recording``); arrays are read when they are looked at."""
    found = {path: re.fullmatch(r"rank(\d+)\.record\.npz", path.name) for path in folder.iterdir()}
    return {int(match[1]): np.load(path) for path, match in sorted(found.items()) if match}


def latents(folder: Path) -> dict[tuple[int, int], Array]:
    """By prompt and by how often the VAE was called, the latents of all pictures in order."""
    parts: dict[tuple[int, int], list[tuple[int, Array]]] = {}
    for record in records(folder).values():
        for key in record:
            if key.startswith("latents/"):
                _, prompt, numbers, times = key.split("/")
                parts.setdefault((int(prompt), int(times)), []).append((int(numbers.split("-")[0]), record[key]))
    return {key: np.concatenate([x for _, x in sorted(found, key=lambda p: p[0])]) for key, found in parts.items()}


def difference(ours: Mapping[Any, Array], theirs: Mapping[Any, Array]) -> float:
    """Largest difference, in parts of the largest value of ``theirs``; NaN if there are any, infinite if the shapes
    differ."""
    if not theirs or {k: a.shape for k, a in ours.items()} != {k: a.shape for k, a in theirs.items()}:
        return float("inf")
    each = [relative(ours[k] - theirs[k], theirs[k]) for k in theirs]
    return float(np.max(each))


def relative(delta: Array, scale: Array) -> float:
    """Largest absolute value of ``delta`` in parts of that of ``scale``."""
    most, of = float(np.abs(delta).max(initial=0)), float(np.abs(scale).max(initial=0))
    return most / of if of else (0.0 if most == 0 else float("inf") if most == most else most)


@dataclass(frozen=True, order=True)
class Divergence:
    """Where the rows of two runs part; ordered by when it happens.

    Args:
        prompt: counted from 0.
        step: counted from 1.
        block: counted from 0; -1: before the first.
        size: of the difference, in parts of the largest row behind that block.
    """

    prompt: int
    step: int
    block: int
    rank: int
    size: float


def first_divergence(ours: Path, theirs: Path, tolerance: float) -> Divergence | None:
    """The first step and there the first block whose rows differ by more than the tolerance, None if there is none.

    Args:
        ours: run folder of the plan.
        theirs: run folder of a single process.
    """
    whole = records(theirs)[0]
    return min(
        (d for rank, record in records(ours).items() for d in divergences(record, whole, rank, tolerance)), default=None
    )


def divergences(
    record: Mapping[str, Array], whole: Mapping[str, Array], rank: int, tolerance: float
) -> Iterator[Divergence]:
    """For each step of a rank's record the first place that differs."""
    known = {(k.split("/")[1], *k.split("/")[3:]): k for k in whole if k.startswith("blocks/")}
    for key in record:
        kind, prompt, numbers, *rest = key.split("/")
        name = known.get((prompt, *rest))
        if kind != "blocks" or name is None:
            continue
        sizes = by_place(record[key], whole[name], bounds(numbers), bounds(name.split("/")[2]), tolerance)
        wrong = np.flatnonzero(~(sizes <= tolerance))
        if len(wrong):
            yield Divergence(int(prompt), int(rest[0]), int(wrong[0]) - 1, rank, float(sizes[wrong[0]]))


def bounds(numbers: str) -> tuple[int, int]:
    """``2-4`` as numbers."""
    start, stop = numbers.split("-")
    return int(start), int(stop)


def by_place(ours: Array, theirs: Array, mine: tuple[int, int], all_of: tuple[int, int], tolerance: float) -> Array:
    """Largest difference before the first and behind each block, 0 where ours has no rows.

    A batch holds all pictures once for each condition of guidance. A rank may have some of the pictures (``mine`` of
    ``all_of``), which is known, and some of the conditions, which is not: it is compared with those with which it
    agrees for most places.

    Args:
        ours: fingerprints ``[places, b, tokens]``, negative where the rank has no row.
        theirs: the same of all pictures and conditions, ``[places, B, tokens]``.
        tolerance: up to which places agree.

    Returns:
        ``[places]``, in parts of the largest fingerprint there.
    """
    places, _, tokens = ours.shape
    if theirs.shape[0] != places or theirs.shape[2] != tokens:
        return np.full(places, np.inf)
    pictures, count = mine[1] - mine[0], all_of[1] - all_of[0]
    ours = ours.reshape(places, -1, pictures, tokens)
    theirs = theirs.reshape(places, -1, count, tokens)[:, :, mine[0] - all_of[0] : mine[1] - all_of[0]]
    scale = np.maximum(theirs.max(axis=(1, 2, 3)), 1e-30)
    some = ours.shape[1]
    fits = []
    for first in range(0, theirs.shape[1] - some + 1, some):
        delta = np.where(ours < 0, 0, np.abs(ours - theirs[:, first : first + some]))
        fits.append(delta.max(axis=(1, 2, 3)) / scale)
    best: Array = min(fits, key=lambda sizes: tuple(~(sizes <= tolerance)))  # which agrees for longest
    return best


@dataclass(frozen=True)
class Likeness:
    """How much pictures are like others.

    Args:
        psnr: peak signal-to-noise ratio in dB of the worst picture, infinite for equal ones.
        ssim: structural similarity of the worst picture.
        most: largest difference of a channel of a pixel, of 255.
    """

    psnr: float
    ssim: float
    most: int


def likeness(ours: Sequence[Path], theirs: Sequence[Path]) -> Likeness:
    """Of the worst of some pictures."""
    pairs = [(pixels(a), pixels(b)) for a, b in zip(ours, theirs, strict=True)]
    return Likeness(
        min(psnr(a, b) for a, b in pairs),
        min(ssim(a, b) for a, b in pairs),
        max(int(np.abs(a - b).max()) for a, b in pairs),
    )


def pixels(path: Path) -> Array:
    """``[h, w, 3]`` in float64, 0 to 255."""
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), dtype=np.float64)


def psnr(a: Array, b: Array) -> float:
    """Peak signal-to-noise ratio in dB."""
    error = float(np.mean((a - b) ** 2))
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def ssim(a: Array, b: Array) -> float:
    """Structural similarity (Wang, Bovik, Sheikh and Simoncelli 2004), the mean over the three channels.

    With the window and the constants of the paper: a Gaussian of 11 x 11 pixels with a deviation of 1.5, K1 = 0.01, K2
        = 0.03; only windows
    that lie inside of the picture count, and a picture of fewer pixels has one as wide as it is.
    """
    size = min(WINDOW, a.shape[0], a.shape[1])
    offsets = np.arange(size) - (size - 1) / 2
    weights = np.exp(-(offsets**2) / (2 * SIGMA**2))
    weights /= weights.sum()

    def blur(x: Array) -> Array:
        for axis in (0, 1):
            n = x.shape[axis] - size + 1
            x = sum(w * x.take(range(i, i + n), axis) for i, w in enumerate(weights))  # type: ignore[assignment]
        return x

    mean_a, mean_b = blur(a), blur(b)
    variance_a, variance_b, covariance = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    top = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return float(np.mean(top / ((mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2))))
