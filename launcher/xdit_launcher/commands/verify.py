"""``xdit-launch verify``: compare a plan with one serial process that uses the same seeds.

A displaced plan differs from the serial process by design. It must equal the same displaced schedule in one process,
the reference that its plugins name; this comparison tells a correct displaced plan from a wrong one.
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
        latents: largest difference of the latents, relative to their largest value.
        rows: the same for the rows after a block; it is smaller, because means of rows vary less.
        levels: largest difference of a channel of a pixel, of 255.
        psnr: smallest peak signal-to-noise ratio of the pictures in dB.
    """

    latents: float
    rows: float
    levels: int = 255
    psnr: float = 0.0


def tolerance(dtype: str) -> Tolerance:
    """The tolerance for a dtype: some rounding, and in half precision pictures that look the same."""
    if dtype == "float32":
        return Tolerance(1e-5, rows=3e-6, levels=1)
    return Tolerance(1e-2, rows=2e-3, psnr=30.0) if dtype == "float16" else Tolerance(5e-2, rows=1.5e-2, psnr=25.0)


@dataclass(frozen=True)
class Comparison:
    """The result of a comparison.

    Args:
        dtype: the number format of the runs.
        latents: difference from the run that must compute the same: the serial run, or the displaced reference.
        pictures: likeness to the pictures of that run, None if none were drawn.
        kind: fidelity of the plan.
        bound: largest difference of the latents that an approximate plan allows.
        compared: plugins of the reference; none if the plan must equal the serial run.
        serial_latents, serial_pictures: difference from and likeness to the serial run.
        where: the first block that differs, None if every block agrees.
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
        """The largest difference of the latents that is tolerated."""
        return max(tolerance(self.dtype).latents, self.bound)

    @property
    def agree(self) -> bool:
        """Whether the latents agree."""
        return self.latents <= self.allowed

    @property
    def good(self) -> bool:
        """Whether the plan computes what it should."""
        limit, pictures = tolerance(self.dtype), None if self.kind == "approximate" else self.pictures
        if not self.agree:
            return False
        return pictures is None or (pictures.largest_difference <= limit.levels and pictures.psnr >= limit.psnr)

    def lines(self) -> Iterator[str]:
        """The verdict in a line or two."""
        other = f"one process with {', '.join(self.compared)}" if self.compared else "the serial run"
        apart = (
            f"latents differ from those of {other} by {self.latents:.2g} of the largest value (tolerance "
            f"{self.allowed:g} in {self.dtype})"
        )
        apart = apart if self.latents else f"latents equal those of {other} bit for bit"
        if self.good and self.kind in ("exact", "unverified"):
            yield f"equal: {apart}{self.describe_pictures(self.pictures)}."
        elif self.good:
            yield f"{self.kind} as it should be: {apart}{self.describe_pictures(self.pictures)}."
            yield (
                f"against serial: latents differ by {self.serial_latents:.2g} of the largest "
                f"value{self.describe_pictures(self.serial_pictures)}."
            )
        elif self.kind == "unverified":
            yield (
                f"unverified: {apart}{self.describe_pictures(self.pictures)}; a plugin of this plan does not declare "
                "its fidelity, so this may be intended."
            )
            yield self.describe_cause()
        else:
            yield f"mismatch: {apart}{self.describe_pictures(self.pictures)}."
            yield self.describe_cause()

    def describe_pictures(self, pictures: Likeness | None) -> str:
        """Words about the likeness of pictures."""
        if pictures is None:
            return ""
        if pictures.largest_difference == 0:
            return "; pictures are equal"
        levels = f"; pictures differ by up to {pictures.largest_difference} of 255"
        return f"{levels}, PSNR {pictures.psnr:.1f} dB, SSIM {pictures.ssim:.4f}"

    def describe_cause(self) -> str:
        """A sentence about where the runs begin to differ."""
        if self.agree:
            return "the latents agree, so the decoding differs."
        if self.where is None:
            return (
                "every block agrees within the tolerance, so the difference arises after the blocks of the last step."
            )
        w = self.where
        prompt = f" of prompt {w.prompt + 1}" if w.prompt else ""
        sizes = f"rows differ by {w.size:.2g} on rank {w.rank} (steps count from 1, blocks from 0 to {self.last})"
        if w.block >= 0:
            return f"the first difference is after block {w.block} at step {w.step}{prompt}: {sizes}."
        cause = (
            "the embedding"
            if w.step == 1
            else f"the head, the guidance or the scheduler after the blocks of step {w.step - 1}"
        )
        return f"the first difference is before block 0 at step {w.step}{prompt}, so its cause is {cause}: {sizes}."


@dataclass
class Verify:
    """One verification: the runs, and their comparison.

    Args:
        chosen: names of the plugins.
        values: flat settings.
        on: the backend.
        folder: the run folder; each run has a folder of its own in it.
        plans: the plans that are run, by name.
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
            if name in self.plans:
                if code := self.run(name):
                    return code
                self.check_records(name)
        comparison = self.compare()
        print_lines(comparison.lines())
        return 0 if comparison.good else MISMATCH

    def plan(self, name: str, plugins: Sequence[str], values: Mapping[str, Any]) -> Plan:
        """Make a plan that records, and that writes into a folder of its own."""
        self.plans[name] = plan = make_plan(
            plugins,
            {**values, "out": f"{self.folder / name}/", "resume": "no", "record": "yes"},
            devices=self.on.devices(),
        )
        return plan

    def run(self, name: str) -> int:
        """Run one of the plans and return the exit code."""
        folder, plan = self.folder / name, self.plans[name]
        make_folder(folder, "runs", plan.run.runs)
        click.echo(
            f"{name}: {describe(plan.axes)}{' with ' + ', '.join(plan.plugins) if plan.plugins else ''}", err=True
        )
        return self.on.start(plan, folder)

    def check_records(self, name: str) -> None:
        """Make sure that what the ranks of a run recorded is here, before the next run is started.

        Raises:
            UsageError: it is not.
        """
        folder = self.folder / name
        records = [folder / f"rank{rank}.record.npz" for rank in range(self.plans[name].world)]
        if missing := [rank for rank, record in enumerate(records) if not record.exists()]:
            raise UsageError(
                f"what rank {missing[0]} recorded is not in {folder}; verify needs a folder that all hosts share, and "
                "a run that is done when its launcher ends (slurm.wait=yes): give such a folder with runs=."
            )

    def compare(self) -> Comparison:
        """Compare what the runs wrote."""
        from xdit_launcher.commands.compare import difference, first_divergence, latents

        plan, expected = self.plans["plan"], "reference" if "reference" in self.plans else "serial"
        plan_latents = latents(self.folder / "plan")
        comparison = Comparison(
            dtype=plan.dtype,
            latents=difference(plan_latents, latents(self.folder / expected)),
            pictures=self.pictures(expected),
            kind=plan.exactness,
            bound=plan.bound,
            compared=plan.compared,
            serial_latents=difference(plan_latents, latents(self.folder / "serial")),
            serial_pictures=self.pictures("serial"),
            last=plan.facts.blocks - 1,
        )
        if comparison.agree:
            return comparison
        rows = tolerance(plan.dtype).rows
        return replace(comparison, where=first_divergence(self.folder / "plan", self.folder / expected, rows))

    def pictures(self, other: str) -> Likeness | None:
        """Likeness of the pictures of the plan to those of another run, None if there are none."""
        from xdit_launcher.commands.compare import likeness

        plan = self.plans["plan"]
        if plan.run.output_type != "image" or plan.facts.video:
            return None
        paths, other_paths = (
            [path for row in targets(self.plans[name].run) for path in row] for name in ("plan", other)
        )
        return likeness(paths, other_paths)


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
