"""``xdit-launch verify``: a plan against one serial process with the same seeds.

A displaced plan differs from serial by design. What it must equal is the displaced schedule in one process, which its
plugins name; so a displaced plan that is right is told from one with an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from xdit_core.errors import UsageError
from xdit_core.filesystem import make_folder
from xdit_core.outputs.names import targets
from xdit_core.plan import Plan
from xdit_core.planning.degrees import describe
from xdit_core.planning.planner import make_plan
from xdit_launcher.printing import print_lines

if TYPE_CHECKING:
    from xdit_launcher.backends.base import Backend
    from xdit_launcher.commands.compare import Divergence, Likeness

MISMATCH = 4  # exit code


@dataclass(frozen=True)
class Tolerance:
    """What may differ between runs that compute the same in another order.

    Args:
        latents: largest difference in parts of the largest value.
        rows: the same of the rows behind a block, whose means are steadier.
        levels: largest difference of a channel of a pixel, of 255.
        psnr: least likeness of the pictures in dB.
    """

    latents: float
    rows: float
    levels: int = 255
    psnr: float = 0.0


def tolerance(dtype: str) -> Tolerance:
    """Some roundings; in half precision pictures that look the same."""
    if dtype == "float32":
        return Tolerance(1e-5, rows=3e-6, levels=1)
    return Tolerance(1e-2, rows=2e-3, psnr=30.0) if dtype == "float16" else Tolerance(5e-2, rows=1.5e-2, psnr=25.0)


@dataclass(frozen=True)
class Finding:
    """What a comparison found.

    Args:
        dtype: in which the runs computed.
        latents: difference from the process that must compute the same: serial, or the displaced reference.
        pictures: likeness to those of that process, None if none were drawn.
        kind: fidelity of the plan.
        bound: largest difference of the latents that an approximate plan allows.
        compared: plugins of the process that must compute the same; none if it is the serial one.
        serial_latents, serial_pictures: difference from and likeness to the serial run.
        where: the first block that differs, if anything does.
        last: index of the last block.
    """

    dtype: str
    latents: float
    pictures: Likeness | None
    kind: str = "exact"
    bound: float = 0.0
    compared: tuple[str, ...] = ()
    serial_latents: float = 0.0
    serial_pictures: Likeness | None = None
    where: Divergence | None = None
    last: int = 0

    @property
    def allowed(self) -> float:
        """Largest difference of the latents."""
        return max(tolerance(self.dtype).latents, self.bound)

    @property
    def agree(self) -> bool:
        """The latents do."""
        return self.latents <= self.allowed

    @property
    def good(self) -> bool:
        """The plan computes what it should."""
        limit, seen = tolerance(self.dtype), None if self.kind == "approximate" else self.pictures
        return self.agree and (seen is None or (seen.most <= limit.levels and seen.psnr >= limit.psnr))

    def lines(self) -> Iterator[str]:
        """For a person."""
        other = f"one process with {', '.join(self.compared)}" if self.compared else "the serial run"
        apart = (
            f"latents differ from those of {other} by {self.latents:.2g} of the largest value (tolerance "
            f"{self.allowed:g} in {self.dtype})"
        )
        apart = apart if self.latents else f"latents are those of {other} bit for bit"
        if self.good and self.kind in ("exact", "unverified"):
            yield f"equal: {apart}{self.seen(self.pictures)}."
        elif self.good:
            yield f"{self.kind} as it should be: {apart}{self.seen(self.pictures)}."
            yield (
                f"against serial: latents differ by {self.serial_latents:.2g} of the largest "
                f"value{self.seen(self.serial_pictures)}."
            )
        elif self.kind == "unverified":
            yield (
                f"unverified: {apart}{self.seen(self.pictures)}; a plugin of this plan does not declare its "
                f"fidelity, so this may be meant."
            )
            yield self.blame()
        else:
            yield f"mismatch: {apart}{self.seen(self.pictures)}."
            yield self.blame()

    def seen(self, pictures: Likeness | None) -> str:
        """Of the pictures."""
        if pictures is None:
            return ""
        if pictures.most == 0:
            return "; pictures are equal"
        return (
            f"; pictures differ by up to {pictures.most} of 255, PSNR {pictures.psnr:.1f} dB, SSIM {pictures.ssim:.4f}"
        )

    def blame(self) -> str:
        """Where it begins."""
        if self.agree:
            return "the latents agree, so it is the decoding that differs."
        if self.where is None:
            return (
                "every block agrees as far as its rows can tell, so it is what lies behind the blocks of the last step."
            )
        w = self.where
        prompt = f" of prompt {w.prompt + 1}" if w.prompt else ""
        sizes = f"rows differ by {w.size:.2g} on rank {w.rank} (steps count from 1, blocks from 0 to {self.last})"
        if w.block >= 0:
            return f"first behind block {w.block} at step {w.step}{prompt}: {sizes}."
        cause = (
            "the embedding"
            if w.step == 1
            else f"the head, the guidance or the scheduler behind the blocks of step {w.step - 1}"
        )
        return f"first before block 0 at step {w.step}{prompt}, so it is {cause}: {sizes}."


@dataclass
class Verify:
    """One verification.

    Args:
        chosen: names of the plugins.
        values: flat settings.
        on: the backend.
        folder: the run folder; each run has a folder of its own in it.
        plans: what ran, by name.
    """

    chosen: Sequence[str]
    values: Mapping[str, Any]
    on: Backend
    folder: Path
    plans: dict[str, Plan] = field(default_factory=dict)

    def __call__(self) -> int:
        """Run and compare.

        Returns:
            0 if the plan computes what it should, ``MISMATCH`` if not, or the exit code of a run that failed.
        """
        plan = self.plan("plan", self.chosen, self.values)
        shared = {k: v for k, v in self.values.items() if k.split(".")[0] not in plan.plugins and k != "nproc"}
        self.plan("serial", (), shared)
        if plan.compared:
            self.plan("reference", plan.compared, {**shared, **plan.reference})
        for name in ("serial", "reference", "plan"):
            if name in self.plans and (code := self.run(name)):
                return code
        found = self.compare()
        print_lines(found.lines())
        return 0 if found.good else MISMATCH

    def plan(self, name: str, plugins: Sequence[str], values: Mapping[str, Any]) -> Plan:
        """A plan that writes into its own folder."""
        self.plans[name] = plan = make_plan(
            plugins,
            {**values, "out": f"{self.folder / name}/", "resume": "no", "record": "yes"},
            devices=self.on.devices(),
        )
        return plan

    def run(self, name: str) -> int:
        """Run one of the plans; its exit code."""
        folder, plan = self.folder / name, self.plans[name]
        make_folder(folder, "runs", plan.run.runs)
        click.echo(
            f"{name}: {describe(plan.axes)}{' with ' + ', '.join(plan.plugins) if plan.plugins else ''}", err=True
        )
        return self.on.start(plan, folder)

    def compare(self) -> Finding:
        """What the runs wrote."""
        from xdit_launcher.commands.compare import difference, first_divergence, latents

        for name, plan in self.plans.items():
            absent = [
                rank for rank in range(plan.world) if not (self.folder / name / f"rank{rank}.record.npz").exists()
            ]
            if absent:
                raise UsageError(
                    f"what rank {absent[0]} recorded is not in {self.folder / name}; verify needs a folder that all "
                    f"hosts share, and a run that is done "
                    "when its launcher ends (slurm.wait=yes): give such a folder with runs=."
                )
        plan, other = self.plans["plan"], "reference" if "reference" in self.plans else "serial"
        dtype = plan.dtype
        ours = latents(self.folder / "plan")
        found = Finding(
            dtype=dtype,
            latents=difference(ours, latents(self.folder / other)),
            pictures=self.pictures(other),
            kind=plan.exactness,
            bound=plan.bound,
            compared=plan.compared,
            serial_latents=difference(ours, latents(self.folder / "serial")),
            serial_pictures=self.pictures("serial"),
            last=plan.facts.blocks - 1,
        )
        if found.agree:
            return found
        return replace(found, where=first_divergence(self.folder / "plan", self.folder / other, tolerance(dtype).rows))

    def pictures(self, other: str) -> Likeness | None:
        """Likeness of the plan's pictures to another run's."""
        from xdit_launcher.commands.compare import likeness

        plan = self.plans["plan"]
        if plan.run.output_type != "image" or plan.facts.video:
            return None
        mine, theirs = ([path for row in targets(self.plans[name].run) for path in row] for name in ("plan", other))
        return likeness(mine, theirs)


def verify(chosen: Sequence[str], values: Mapping[str, Any], on: Backend, new_folder: Callable[[Plan], Path]) -> int:
    """Run a plan and its serial counterpart, and say whether they agree.

    Args:
        chosen: names of the plugins.
        values: flat settings.
        on: the backend.
        new_folder: makes the run folder.

    Returns:
        The exit code.

    Raises:
        UsageError: ``out`` is given, or there is no prompt.
    """
    if "out" in values:
        raise UsageError("verify writes into its run folder; leave out out=.")
    plan = make_plan(chosen, values, devices=on.devices())  # refusals come before anything is written
    if not plan.run.prompt:
        raise UsageError('there is no prompt; write what to draw, such as "red heart".')
    for note in plan.notes:
        print_lines([note], err=True)
    on.check(plan)
    return Verify(tuple(chosen), values, on, new_folder(plan))()
