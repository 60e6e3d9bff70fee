"""Compare two runs: their latents, their pictures and the rows after every block. With numpy, without torch."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

WINDOW, SIGMA = 11, 1.5  # of the structural similarity


def records(folder: Path) -> dict[int, Mapping[str, Array]]:
    """What each rank recorded, see `xdit_core.observe.recording`; an array is read when it is used."""
    matches = {path: re.fullmatch(r"rank(\d+)\.record\.npz", path.name) for path in folder.iterdir()}
    return {int(match[1]): np.load(path) for path, match in sorted(matches.items()) if match}


def latents(folder: Path) -> dict[tuple[int, int], Array]:
    """The latents of all pictures in order, by prompt and by the number of the call of the VAE."""
    parts: dict[tuple[int, int], list[tuple[int, Array]]] = {}
    for record in records(folder).values():
        for key in record:
            if key.startswith("latents/"):
                _, prompt, numbers, times = key.split("/")
                parts.setdefault((int(prompt), int(times)), []).append((int(numbers.split("-")[0]), record[key]))
    return {
        key: np.concatenate([array for _, array in sorted(pieces, key=lambda piece: piece[0])])
        for key, pieces in parts.items()
    }


def difference(actual: Mapping[Any, Array], expected: Mapping[Any, Array]) -> float:
    """The largest difference, relative to the largest value of ``expected``.

    It is NaN if a value is, and infinite if the shapes differ.
    """
    if not expected or {k: a.shape for k, a in actual.items()} != {k: a.shape for k, a in expected.items()}:
        return float("inf")
    each = [relative(actual[k] - expected[k], expected[k]) for k in expected]
    return float(np.max(each))


def relative(delta: Array, scale: Array) -> float:
    """The largest absolute value of ``delta``, relative to that of ``scale``."""
    largest, unit = float(np.abs(delta).max(initial=0)), float(np.abs(scale).max(initial=0))
    if unit:
        return largest / unit
    return 0.0 if largest == 0 else float("nan") if np.isnan(largest) else float("inf")


@dataclass(frozen=True, order=True)
class Divergence:
    """Where the rows of two runs begin to differ; the earliest is the smallest.

    Args:
        prompt: counted from 0.
        step: counted from 1.
        block: counted from 0; -1: before the first.
        rank: the rank whose rows differ.
        size: of the difference, relative to the largest row after that block.
    """

    prompt: int
    step: int
    block: int
    rank: int
    size: float


def first_divergence(plan_folder: Path, single_folder: Path, tolerance: float) -> Divergence | None:
    """Find the first step, and there the first block, whose rows differ by more than the tolerance; None if all agree.

    Args:
        plan_folder: run folder of the plan.
        single_folder: run folder of a single process.
    """
    single = records(single_folder)[0]
    by_rank = (divergences(record, single, rank, tolerance) for rank, record in records(plan_folder).items())
    return min(itertools.chain.from_iterable(by_rank), default=None)


def divergences(
    record: Mapping[str, Array], single: Mapping[str, Array], rank: int, tolerance: float
) -> Iterator[Divergence]:
    """For each step of a rank's record, the first block that differs.

    Args:
        record: of the rank.
        single: of a single process.
    """
    keys = {(k.split("/")[1], *k.split("/")[3:]): k for k in single if k.startswith("blocks/")}
    for key in record:
        kind, prompt, numbers, *step = key.split("/")
        name = keys.get((prompt, *step))
        if kind != "blocks" or name is None:
            continue
        sizes = by_place(record[key], single[name], bounds(numbers), bounds(name.split("/")[2]), tolerance)
        differing = np.flatnonzero(~(sizes <= tolerance))
        if len(differing):
            yield Divergence(int(prompt), int(step[0]), int(differing[0]) - 1, rank, float(sizes[differing[0]]))


def bounds(numbers: str) -> tuple[int, int]:
    """The two numbers of a text such as ``2-4``."""
    start, stop = numbers.split("-")
    return int(start), int(stop)


def by_place(
    rows: Array, expected: Array, own_pictures: tuple[int, int], all_pictures: tuple[int, int], tolerance: float
) -> Array:
    """The largest difference before the first block and after each block, 0 where the rank has no rows.

    A batch holds all pictures once for each condition of guidance. A rank may have only some of the pictures, which is
    known, and only some of the conditions, which is not known: it is compared with the conditions with which it agrees
    in most places.

    Args:
        rows: fingerprints of the rank ``[places, b, tokens]``, negative where it has no row.
        expected: those of all pictures and conditions, ``[places, B, tokens]``.
        own_pictures, all_pictures: first picture, and the one after the last, of the rank and of all.
        tolerance: the largest difference of places that agree.

    Returns:
        ``[places]``, relative to the largest fingerprint there.
    """
    places, _, tokens = rows.shape
    if expected.shape[0] != places or expected.shape[2] != tokens:
        return np.full(places, np.inf)
    pictures, count = own_pictures[1] - own_pictures[0], all_pictures[1] - all_pictures[0]
    rows = rows.reshape(places, -1, pictures, tokens)
    offset = own_pictures[0] - all_pictures[0]
    expected = expected.reshape(places, -1, count, tokens)[:, :, offset : offset + pictures]
    scale = np.maximum(expected.max(axis=(1, 2, 3)), 1e-30)
    conditions = rows.shape[1]
    fits = []
    for first in range(0, expected.shape[1] - conditions + 1, conditions):
        delta = np.where(rows < 0, 0, np.abs(rows - expected[:, first : first + conditions]))
        fits.append(delta.max(axis=(1, 2, 3)) / scale)
    best: Array = min(fits, key=lambda sizes: tuple(~(sizes <= tolerance)))  # which agrees in the longest run of places
    return best


@dataclass(frozen=True)
class Likeness:
    """How much pictures resemble others.

    Args:
        psnr: peak signal-to-noise ratio in dB of the worst picture, infinite for equal ones.
        ssim: structural similarity of the worst picture.
        largest_difference: of a channel of a pixel, of 255.
    """

    psnr: float
    ssim: float
    largest_difference: int


def likeness(paths: Sequence[Path], other_paths: Sequence[Path]) -> Likeness:
    """The likeness of the pair of pictures that resemble each other least."""
    pairs = [(pixels(a), pixels(b)) for a, b in zip(paths, other_paths, strict=True)]
    return Likeness(
        min(psnr(a, b) for a, b in pairs),
        min(ssim(a, b) for a, b in pairs),
        max(int(np.abs(a - b).max()) for a, b in pairs),
    )


def pixels(path: Path) -> Array:
    """The pixels of a picture, ``[h, w, 3]`` in float64, 0 to 255."""
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
