"""``xdit-launch verify``: a plan that is right, one that is displaced, one with an error."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result

from helpers.launcher import FAULTY, SKEWED
from xdit_launcher.commands import compare
from xdit_launcher.commands.verify import MISMATCH, Comparison, tolerance

Launch = Callable[..., Any]
PLUGINS = os.pathsep.join([str(SKEWED), str(FAULTY)])


def verdict(out: str) -> list[str]:
    """The lines behind those of the files."""
    return [line for line in out.splitlines() if not line.startswith("/")]


def test_equal(launch: Launch, tiny: tuple[str, ...]) -> None:
    run = launch("verify", "--plugins", "usp", "usp.ulysses=2", *tiny, "a red fox", "images=2", "seed=3")
    code, out, err = run.wait(120)
    assert code == 0, err
    (line,) = verdict(out)
    assert line.startswith("equal: latents differ from those of the serial run by ")
    assert "(tolerance 1e-05 in float32); pictures " in line
    assert "serial: one process" in err and "plan: ulysses 2 with usp" in err
    names = {p.relative_to(run.run_folder).as_posix() for p in run.run_folder.rglob("*.*")}
    assert {"serial/a-red-fox-4.png", "plan/a-red-fox-3.png", "plan/rank1.record.npz"} <= names
    assert run.none_left()


def test_displaced(launch: Launch, tiny: tuple[str, ...]) -> None:
    """Stages and shards against the same patches in one process; pictures of several ranks."""
    run = launch(
        "verify",
        "--plugins",
        "pipefusion,dp",
        "pipefusion.layers=1,3",
        "dp.degree=2",
        *tiny,
        "a red fox",
        "images=2",
    )
    code, out, err = run.wait(180)
    assert code == 0, err
    right, apart = verdict("\n".join(line for line in out.splitlines() if "by another rank" not in line))
    assert right.startswith("displaced as it should be: latents differ from those of one process with pipefusion by ")
    assert apart.startswith("against serial: latents differ by 0.") and "dB, SSIM 0." in apart
    assert "reference: one process with pipefusion" in err


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (
            ("--plugins", "usp,skewed", "usp.ulysses=2"),
            (
                "latents differ from those of the serial run",
                "the first difference is after block 2 at step 1: rows differ by ",
                "on rank 0 (steps count from 1, blocks from 0 to 3).",
            ),
        ),
        (
            (
                "--plugins",
                "pipefusion,cfg,skewed",
                "pipefusion.stages=1",
                "pipefusion.patches=2",
                "skewed.step=2",
                "skewed.block=3",
                "skewed.rank=1",
            ),
            (
                "latents differ from those of one process with pipefusion",
                "the first difference is after block 3 at step 2: rows",
                "on rank 1",
            ),
        ),
        (
            ("--plugins", "skewed", "skewed.block=-1", "output_type=latent"),
            (
                "the first difference is before block 0 at step 2, so its cause is the head, the guidance or the "
                "scheduler after the blocks of step 1",
            ),
        ),
        (
            ("--plugins", "skewed", "skewed.block=-1", "steps=1"),
            ("every block agrees within the tolerance, so the difference arises after the blocks of the last step.",),
        ),
    ],
)
def test_mismatch_is_located(
    launch: Launch, tiny: tuple[str, ...], words: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    code, out, err = launch(
        "verify",
        *(w for w in tiny if w != "steps=3" or "steps=1" not in words),
        *words,
        "a red fox",
        PYTHONPATH=PLUGINS,
    ).wait(180)
    assert code == MISMATCH, err
    wrong, where = verdict(out)
    assert wrong.startswith("mismatch: latents differ from those of ")
    assert all(part in wrong + where for part in parts), out


def test_a_run_that_fails_is_reported_as_by_run(launch: Launch, tiny: tuple[str, ...]) -> None:
    run = launch("verify", "--plugins", "faulty", "faulty.rank=0", *tiny, "a red fox")
    code, out, err = run.wait(120)
    assert code == 1 and verdict(out) == []
    assert "rank 0 of 1 on " in err and "ValueError: a number that is no number" in err
    assert run.none_left()


def test_refused_before_anything_is_started(say: Callable[..., Result], tiny: tuple[str, ...]) -> None:
    assert "verify writes into its run folder; leave out out=." in say("verify", *tiny, "a", "out=x.png").stderr
    refused = say("verify", "--plugins", "usp", "usp.ulysses=3", *tiny, "a")
    assert refused.exit_code == 3 and "sd3 has 4 heads" in refused.stderr
    assert not Path("runs").exists()
    assert "It is 4 if not" in " ".join(say("verify", "--help").stdout.split())


def test_the_verdict_on_pictures() -> None:
    """Latents that agree do not excuse a wrong decoder; half precision may differ more."""
    like = compare.Likeness(psnr=28.0, ssim=0.9, largest_difference=60)
    text = "\n".join(Comparison("float32", 1e-6, like).lines())
    assert text.startswith("mismatch:") and "the latents agree, so the decoding differs." in text
    assert Comparison("bfloat16", 1e-2, like).good and not Comparison("float16", 1e-3, like).good
    assert not Comparison("float32", float("nan"), None).good
    assert tolerance("float32").latents == 1e-5
    assert [*Comparison("float32", 0.0, None).lines()] == ["equal: latents equal those of the serial run bit for bit."]


def test_similarity_of_pictures() -> None:
    """Against the formula written down pixel by pixel."""
    random = np.random.default_rng(0)
    a = random.integers(0, 256, (16, 14, 3)).astype(float)
    b = np.clip(a + random.normal(0, 20, a.shape), 0, 255)
    g = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    w = np.outer(g, g)[..., None] / g.sum() ** 2
    values = []
    for y in range(16 - 10):
        for x in range(14 - 10):
            p, q = a[y : y + 11, x : x + 11], b[y : y + 11, x : x + 11]
            mp, mq = (w * p).sum((0, 1)), (w * q).sum((0, 1))
            vp, vq, c = (
                (w * (p - mp) ** 2).sum((0, 1)),
                (w * (q - mq) ** 2).sum((0, 1)),
                (w * (p - mp) * (q - mq)).sum((0, 1)),
            )
            c1, c2 = 6.5025, 58.5225
            values.append((2 * mp * mq + c1) * (2 * c + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    assert compare.ssim(a, b) == pytest.approx(np.mean(values), abs=1e-9)
    assert compare.ssim(a, a) == pytest.approx(1.0) and compare.ssim(a[:4, :4], a[:4, :4]) == pytest.approx(1.0)
    assert compare.psnr(a, a) == float("inf") and compare.psnr(a, a + 16) == pytest.approx(24.05, abs=0.01)


def test_rows_of_some_pictures_and_conditions() -> None:
    """Two conditions of three pictures; a rank has the second condition of pictures 1 and 2, and half of the rows."""
    whole = np.random.default_rng(1).random((4, 6, 8)).astype(np.float32)
    mine = np.full((4, 2, 8), -1, np.float32)
    mine[2:, :, 4:] = whole.reshape(4, 2, 3, 8)[2:, 1, 1:, 4:]
    assert not compare.by_place(mine, whole, (1, 3), (0, 3), 1e-6).any()
    mine[3, 0, 5] += 0.5
    assert np.flatnonzero(compare.by_place(mine, whole, (1, 3), (0, 3), 1e-6)).tolist() == [3]
    mine[2, 0, 5] = np.nan
    assert np.isnan(compare.by_place(mine, whole, (1, 3), (0, 3), 1e-6)[2])
    assert np.isinf(compare.by_place(mine[:, :, 1:], whole, (1, 3), (0, 3), 1e-6)).all()
