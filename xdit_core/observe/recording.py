"""Records the latents and one number for each token behind each block, so that ``xdit-launch verify`` can compare runs.

The number is the mean absolute value of the token's channels, its *fingerprint*. A rank holds only some tokens of the
picture; their fingerprints are compared with those of a serial run, which holds all. A rank records if the plan says
``record=yes``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from xdit_core.filesystem import atomically
from xdit_core.observe.observer import Observer
from xdit_core.plan import Plan

if TYPE_CHECKING:
    from xdit_core.points.context import ForwardContext
    from xdit_core.points.request import Job, Output

NOT_HELD = -1.0  # no mean of absolute values; a NaN stays one


def record_path(folder: Path, rank: int) -> Path:
    """Where a rank writes what it recorded."""
    return folder / f"rank{rank}.record.npz"


@contextmanager
def recording(recorder: Recorder | None, path: Path) -> Iterator[None]:
    """Write what was recorded inside into a file, if it all went through and there is a recorder."""
    yield
    if recorder is not None:
        with atomically(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **recorder.arrays)


class Recorder(Observer):
    """Records the rows between the blocks and the latents before the VAE.

    ``arrays`` holds, for each step and branch of each job, ``blocks/PROMPT/START-STOP/STEP/BRANCH``: fingerprints
    ``[1 + blocks, B, tokens]``, first those before the first block, with ``NOT_HELD`` where this rank has no row; and
    on the owner ``latents/PROMPT/START-STOP/N``: what the VAE is given for the ``N``-th time, or the output. START and
    STOP are the numbers of the job's pictures; steps count from 1.

    Args:
        plan: of the run.
        rank: number of this rank.
    """

    def __init__(self, plan: Plan, rank: int) -> None:
        self._blocks, self._owner = plan.facts.blocks, plan.owns(rank)
        self.arrays: dict[str, Any] = {}
        self._job, self._step, self._times = "", 1, 0

    def job_started(self, job: Job) -> None:
        """Record another call of the pipeline under its own name."""
        self._job = f"{job.index}/{job.numbers.start}-{job.numbers.stop}"
        self._step, self._times = 1, 0

    def step_done(self, step: int, steps: int) -> None:
        """Count the rows that follow to the next step."""
        self._step = step + 1

    def rows(self, place: int, rows: torch.Tensor, context: ForwardContext) -> None:
        """Keep the fingerprints of rows."""
        means = rows.detach().double().abs().mean(-1).float().cpu().numpy()
        key = f"blocks/{self._job}/{self._step}/{context.branch.number}"
        shape = (1 + self._blocks, rows.shape[0], context.layout.tokens)
        array = self.arrays.get(key)
        if array is None or array.shape != shape:
            array = self.arrays[key] = np.full(shape, NOT_HELD, dtype=np.float32)
        done = 0
        for start, stop in context.layout.picture(context.patch, context.shard):
            array[place, :, start:stop] = means[:, done : done + stop - start]
            done += stop - start

    def latents(self, latents: torch.Tensor) -> None:
        """Keep latents that are done."""
        if self._owner:
            self.arrays[f"latents/{self._job}/{self._times}"] = latents.detach().float().cpu().numpy()
            self._times += 1

    def output_done(self, output: Output) -> None:
        """Keep the latents of an output that is not decoded."""
        if output.latents is not None:
            self.latents(output.latents)
