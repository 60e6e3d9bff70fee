"""The plan of a run as data. The launcher makes it and writes it as JSON; every rank makes it again and compares.

Plans are made by ``xdit_core.planning.planner``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from xdit_core.checkpoints.fingerprints import checkpoint_fingerprint
from xdit_core.frozen import Record
from xdit_core.records import FIDELITIES, Axis, ModelFacts
from xdit_core.settings import SIDE_SETTINGS, RunSettings


@dataclass(frozen=True)
class Plan(Record):
    """Everything that decides what a run computes.

    Args:
        plugins: the selected strategies by name, each with its (distribution, version).
        model: name of the adapter.
        model_origin: (distribution, version) of the adapter.
        folder: local folder of the checkpoint.
        values: the settings as the user gave them, from which a rank makes the plan again.
        run: the shared settings with the model's defaults filled in.
        call: further arguments of the pipeline's ``__call__``.
        axes: mesh axes with their degrees, outermost first.
        wraps: for each point, pairs (level, plugin), outermost first.
        transforms: pairs (phase, plugin) in the order in which they run.
        claims: the plugin that owns each slot.
        stages: name of the axis along which the blocks are divided, "" if they are not.
        split: number of blocks of each stage; one entry if they are not divided.
        patches: number of patches into which the tokens are cut in time.
        fidelity: for each plugin how near its result is to that of one process, see ``Fidelity``.
        bound: largest difference of the latents that approximate plugins allow, relative to their largest value.
        compared: the plugins of the reference, which is one process with the same schedule.
        reference: settings with which these plugins alone compute the same in one process.
        facts: what was read from the files of the model.
        notes: sentences for the user about what was decided.
        observers: the plugins that only observe.
    """

    plugins: Mapping[str, tuple[str, str]]
    model: str
    model_origin: tuple[str, str]
    folder: str
    values: Mapping[str, Any]
    run: RunSettings
    call: Mapping[str, Any]
    axes: tuple[Axis, ...]
    wraps: Mapping[str, tuple[tuple[str, str], ...]]
    transforms: tuple[tuple[str, str], ...]
    claims: Mapping[str, str]
    stages: str
    split: tuple[int, ...]
    patches: int
    fidelity: Mapping[str, str]
    bound: float
    compared: tuple[str, ...]
    reference: Mapping[str, Any]
    facts: ModelFacts
    notes: tuple[str, ...] = ()
    observers: tuple[str, ...] = ()

    @property
    def displaced(self) -> tuple[str, ...]:
        """The plugins that use keys and values of the step before."""
        return tuple(name for name, kind in self.fidelity.items() if kind == "displaced")

    @property
    def exactness(self) -> str:
        """The fidelity of the whole plan, which is that of the plugin that promises least."""
        return max(self.fidelity.values(), key=FIDELITIES.index, default="exact")

    @property
    def world(self) -> int:
        """The number of ranks."""
        return math.prod(a.degree or 1 for a in self.axes)

    @property
    def picture_axes(self) -> tuple[str, ...]:
        """Axes whose ranks work on one picture together."""
        return tuple(axis.name for axis in self.axes if not axis.own_outputs)

    @property
    def ranks_of_a_picture(self) -> int:
        """Number of ranks that work on one picture together."""
        return math.prod(self.degree(axis) for axis in self.picture_axes)

    def degree(self, axis: str) -> int:
        """The degree of an axis, 1 if the plan has no such axis."""
        return next((a.degree or 1 for a in self.axes if a.name == axis), 1)

    @property
    def shards(self) -> int:
        """The number of ranks that divide the tokens among themselves."""
        return math.prod(a.degree or 1 for a in self.axes if a.shards_tokens)

    def to_json(self) -> str:
        """The plan as JSON; ``from_json`` reads it."""
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True)

    @staticmethod
    def from_json(text: str) -> Plan:
        """Read what ``to_json`` wrote."""
        d = json.loads(text)
        run: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in d["run"].items()}
        d["run"] = RunSettings(**run)
        d["axes"] = tuple(
            Axis(**{**a, "choices": None if a["choices"] is None else tuple(a["choices"])}) for a in d["axes"]
        )
        d["wraps"] = {point: tuple((level, name) for level, name in pairs) for point, pairs in d["wraps"].items()}
        d["transforms"] = tuple((phase, name) for phase, name in d["transforms"])
        d["plugins"] = {name: tuple(origin) for name, origin in d["plugins"].items()}
        d["facts"] = ModelFacts(**{**d["facts"], "loras": tuple(d["facts"]["loras"])})
        for key in ("model_origin", "split", "compared", "notes", "observers"):
            d[key] = tuple(d[key])
        return Plan(**d)

    def coordinates(self, rank: int) -> dict[str, int]:
        """The index of a rank on every axis; the last axis runs fastest."""
        index: dict[str, int] = {}
        for axis in reversed(self.axes):
            rank, index[axis.name] = divmod(rank, axis.degree or 1)
        return {axis.name: index[axis.name] for axis in self.axes}

    def owns(self, rank: int) -> bool:
        """Whether the rank has results of its own, which it writes."""
        return self.owner_of(rank) == rank

    def owner_of(self, rank: int) -> int:
        """The rank that owns the pictures on which a rank works."""
        coordinates, owner = self.coordinates(rank), 0
        for axis in self.axes:
            owner = owner * (axis.degree or 1) + (coordinates[axis.name] if axis.own_outputs else 0)
        return owner

    @property
    def device(self) -> str:
        """Where the ranks compute, ``cpu`` or ``cuda``; it is decided when the plan is made."""
        return self.run.device or "cpu"

    @property
    def dtype(self) -> str:
        """In which numbers the denoiser computes: as given, or float32 on CPUs and bfloat16 on GPUs."""
        return self.run.dtype or ("float32" if self.device == "cpu" else "bfloat16")

    @cached_property
    def checkpoint(self) -> str | None:
        """A digest of the contents of the checkpoint, None if it cannot be read here."""
        return checkpoint_fingerprint(Path(self.folder))

    def digest(self) -> str:
        """A digest of what is computed: plans with equal digests compute the same.

        Where files are, where results go and how a run is watched does not change it.
        """
        data = json.loads(self.to_json())
        for key in ("folder", "notes", "observers"):
            del data[key]
        for name in self.observers:
            del data["plugins"][name], data["fidelity"][name]
        for key in SIDE_SETTINGS:
            data["run"].pop(key, None)
        own = {f.name.rstrip("_") for f in dataclasses.fields(RunSettings)}  # these are in ``run``, with their defaults
        own |= {"model.path", "model.download_dir"}
        values = {key: value for key, value in data["values"].items() if key not in own}
        data["values"] = {key: value for key, value in values.items() if key.split(".")[0] not in self.observers}
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]
