"""Change the LoRAs in the weights of a loaded pipeline from request to request.

The tensors that LoRAs were added to, or are to be added to, are read from the checkpoint again, as when the pipeline
was loaded, and are written into the parameters that are there. So the weights are those of a pipeline that was loaded
with these LoRAs, nothing is kept meanwhile, and compiled code stays valid.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from xdit_core.checkpoints.model_facts import fingerprints
from xdit_core.engine.loading import Loaded, quiet, read
from xdit_core.engine.lora.adapters import Deltas, read_loras
from xdit_core.errors import ModelError, UsageError, XditError
from xdit_core.observe.status import Phase, Status
from xdit_core.parallel.rank import Rank
from xdit_core.records import join_words

FAILED = -1
State = Mapping[str, tuple[float, tuple[Any, ...]]]


class Loras:
    """The LoRAs in the weights of one rank.

    Args:
        rank: this rank.
        loaded: its pipeline.
        scales: scale of each LoRA that it was loaded with, by path.
    """

    def __init__(self, rank: Rank, loaded: Loaded, scales: Mapping[str, float]) -> None:
        self._rank, self._pipe, self._weights, self._first = rank, loaded.pipe, loaded.weights, dict(scales)
        self._state: State | None = state_of_loras(scales)  # None while nobody knows
        self._changed = {name: weights.changed for name, weights in loaded.weights.items()}
        self._files = self._state_of_checkpoint()

    def change(self, scales: Mapping[str, float] | None = None) -> None:
        """Make the weights what they would be if the pipeline had been loaded with these LoRAs; every rank must call
        this with the same.

        Args:
            scales: scale of each LoRA, by path; None for those that it was loaded with.

        Raises:
            UsageError: the weights cannot be changed.
            ModelError: a LoRA does not fit.
            XditError: the ranks do not have the same files.
        """
        scales = self._first if scales is None else scales
        wanted = state_of_loras(scales)
        if wanted == {} == self._state or not self._rank.agree(wanted != self._state, any):
            return
        self._rank.observer.status(Status(Phase.LOADING, "LoRAs"))
        deltas: dict[str, Deltas] = {}
        failure: XditError | None = None
        try:
            deltas = self._read(scales)
            number = int(hashlib.sha256("".join(fingerprints(sorted(scales))).encode()).hexdigest()[:12], 16)
        except XditError as error:
            number, failure = FAILED, error
        except OSError as error:
            number, failure = FAILED, ModelError(f"lora={', '.join(scales)} cannot be read: {error}.")
        if self._rank.agree(number, same) == FAILED:
            raise failure or XditError(
                f"the ranks have different files for {', '.join(scales)}; put the same ones on every machine."
            )
        self._state = None
        self._write(deltas)
        self._state = wanted

    @quiet()
    def _read(self, scales: Mapping[str, float]) -> dict[str, Deltas]:
        """What to add to which weights."""
        fix = "give lora= when the engine is made"
        if not self._weights:
            raise UsageError(f"LoRAs are added to weights that are read again, which pipe= does not allow; {fix}.")
        if self._files != self._state_of_checkpoint():
            raise XditError(
                f"the files of {self._rank.plan.folder} have changed since they were loaded, so that the LoRAs cannot "
                "change; make a new Engine."
            )
        models = {name: weights.part.make() for name, weights in self._weights.items()} if scales else {}
        deltas = read_loras(self._pipe, models, scales)
        for name, keys in self._affected(deltas).items():
            there = set(map(id, self._pipe.components[name].parameters()))
            if not all(id(self._weights[name].parameters[key]) in there for key in keys):
                others = [plugin for phase, plugin in self._rank.plan.transforms if phase not in ("adapt", "shard")]
                raise UsageError(f"{join_words(others)} has replaced the weights of {name} by others; {fix}.")
        return deltas

    def _affected(self, deltas: Mapping[str, Deltas]) -> dict[str, list[str]]:
        """Names of the parameters of this rank that get other values, by model."""
        return {
            name: sorted((self._changed[name] | deltas.get(name, {}).keys()) & weights.parameters.keys())
            for name, weights in self._weights.items()
        }

    @torch.no_grad()
    @quiet()
    def _write(self, deltas: Mapping[str, Deltas]) -> None:
        """Read the affected tensors again, and add to them."""
        for name, keys in self._affected(deltas).items():
            weights, added = self._weights[name], deltas.get(name, {})
            self._changed[name] |= added.keys()  # until all are written
            if not keys:
                continue
            with weights.part.tensors() as tensors:
                for i, key in enumerate(keys):
                    self._rank.observer.status(Status(Phase.LOADING, f"LoRAs: tensor {i + 1} of {len(keys)} of {name}"))
                    local(weights.parameters[key]).copy_(local(read(tensors, key, weights.shapes[key], added.get(key))))
        self._changed = {name: frozenset(deltas.get(name, {})) for name in self._weights}

    def _state_of_checkpoint(self) -> dict[str, tuple[Any, ...]]:
        return {name: state_of(Path(weights.part.origin)) for name, weights in self._weights.items()}


def state_of_loras(scales: Mapping[str, float]) -> State:
    """Scale and state of the files of each LoRA, by path."""
    return {path: (scale, state_of(Path(path))) for path, scale in scales.items()}


def state_of(path: Path) -> tuple[Any, ...]:
    """Name, size and time of the last change of a file, or of each file of a folder; () if there is none."""
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.exists() else []
    return tuple((file.name, (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files)


def same(values: Sequence[int]) -> int:
    """The value of all ranks, ``FAILED`` if it is not one."""
    return values[0] if len(set(values)) == 1 else FAILED


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
