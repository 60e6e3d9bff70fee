"""What ``xdit-launch verify`` needs of a run: a fingerprint of every row before the first and behind every block, and
the latents.

A rank records if a file ``record`` lies in the run folder when it starts. The fingerprint of a row is the mean absolute
value of its channels: one number for each token, so that what a rank holds of the picture can be compared with a run
that holds all of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xdit_core.engine.engine import Engine, denoisers_of
from xdit_core.filesystem import atomically
from xdit_core.model_spec import Stream
from xdit_core.outputs.results import RECORD
from xdit_core.parallel.patch_tensor import materialized
from xdit_core.parallel.tokens import length
from xdit_core.points.request import Done, Job, Output, Started

NOT_HELD = -1.0  # no mean of absolute values; a NaN stays one


def record_path(folder: Path, rank: int) -> Path:
    """Where a rank writes what it recorded."""
    return folder / f"rank{rank}.record.npz"


@contextmanager
def recording(engine: Engine, folder: Path, started: Started, done: Done) -> Iterator[tuple[Started, Done]]:
    """Record what happens inside, if the run folder asks for it.

    Args:
        folder: the run folder.
        started, done: what the request would be given.

    Yields:
        ``started`` and ``done`` for the request.
    """
    if not (folder / RECORD).exists():
        yield started, done
        return
    recorder = Recorder(engine)

    def begin(job: Job) -> None:
        recorder.begin(job)
        started(job)

    def keep(output: Output) -> None:
        if output.latents is not None:
            recorder.latents(output.latents)
        done(output)

    yield begin, keep
    with atomically(record_path(folder, engine.rank.mesh.rank)) as temporary, temporary.open("wb") as file:
        np.savez(file, **recorder.arrays)


class Recorder:
    """Listens to the blocks and to the VAE of an engine.

    ``arrays`` holds, for each step and branch of each job, ``blocks/PROMPT/START-STOP/STEP/BRANCH``: fingerprints
    ``[1 + blocks, B, tokens]``, first those before the first block, with ``NOT_HELD`` where this rank has no row; and
    on the owner ``latents/PROMPT/START-STOP/N``: what the VAE is given for the ``N``-th time, or the output. START and
    STOP are the numbers of the job's pictures; steps count from 1.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.arrays: dict[str, Any] = {}
        self._job, self._step, self._times = "", 1, 0
        for index, block, stream in blocks_of(engine):
            block.register_forward_hook(partial(self.behind, index, stream))
            if index == 0:
                self._names = tuple(inspect.signature(block.forward).parameters)
                block.register_forward_pre_hook(partial(self.before, stream), with_kwargs=True)
        self._progress, engine.progress = engine.progress, self.progressed
        if engine.decode is not None:
            self._decode = engine.pipe.vae.decode
            engine.pipe.vae.decode = self.decoding

    def begin(self, job: Job) -> None:
        """Another call of the pipeline."""
        self._job = f"{job.index}/{job.numbers.start}-{job.numbers.stop}"
        self._step, self._times = 1, 0

    def progressed(self, step: int, steps: int) -> None:
        """A step is done."""
        self._step = step + 1
        if self._progress:
            self._progress(step, steps)

    def before(self, stream: Stream, block: Any, args: Any, kwargs: Any) -> None:
        """The rows that the first block gets."""
        self.look(0, stream, {**dict(zip(self._names, args, strict=False)), **kwargs}[stream.tokens])

    def behind(self, index: int, stream: Stream, block: Any, args: Any, out: Any) -> None:
        """The rows that a block gave."""
        parts = dict(zip(stream.returns, out if isinstance(out, tuple) else (out,), strict=False))
        self.look(index + 1, stream, parts["tokens"])

    def look(self, place: int, stream: Stream, rows: torch.Tensor) -> None:
        """Take the fingerprints of rows ``[B, n, D]``."""
        context = self.engine.rank.context
        layout = context.layout
        spans = layout.picture(context.patch, context.shard)
        if stream.joined:
            rows = rows[:, : length(spans)]
        if rows.shape[1] != length(spans):  # text and picture in one: the adapter takes them apart elsewhere
            return
        means = rows.detach().double().abs().mean(-1).float().cpu().numpy()
        key = f"blocks/{self._job}/{self._step}/{context.branch.number}"
        shape = (1 + self.engine.plan.facts.blocks, rows.shape[0], layout.tokens)
        array = self.arrays.get(key)
        if array is None or array.shape != shape:
            array = self.arrays[key] = np.full(shape, NOT_HELD, dtype=np.float32)
        done = 0
        for start, stop in spans:
            array[place, :, start:stop] = means[:, done : done + stop - start]
            done += stop - start

    def decoding(self, latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Stands for ``vae.decode``."""
        latents = materialized(latents)
        self.latents(latents)
        return self._decode(latents, *args, **kwargs)

    def latents(self, latents: torch.Tensor) -> None:
        """Latents that are done."""
        if self.engine.owner:
            self.arrays[f"latents/{self._job}/{self._times}"] = latents.detach().float().cpu().numpy()
            self._times += 1


def blocks_of(engine: Engine) -> Iterator[tuple[int, torch.nn.Module, Stream]]:
    """The blocks that this rank holds, by global index, and how they are called."""
    spec = engine.rank.spec
    for trunk in engine.trunks:
        yield from ((int(name), block, trunk.stream) for name, block in trunk.blocks.items())
    for denoiser in () if engine.trunks else denoisers_of(engine.pipe, spec).values():
        index = 0
        for part in spec.trunk.blocks:
            for block in getattr(denoiser, part.attribute):
                if part.make is None:  # else the denoiser has no such module
                    yield index, block, spec.trunk.stream_of(part)
                index += 1
