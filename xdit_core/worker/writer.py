"""Write each result of a rank as soon as it exists, so that a later failure loses nothing."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from xdit_core.errors import XditError
from xdit_core.observe.observer import Observer
from xdit_core.observe.status import Phase, Status
from xdit_core.outputs import results
from xdit_core.outputs.names import targets
from xdit_core.printable import printable
from xdit_core.worker.heartbeat import HeartbeatWriter
from xdit_core.worker.progress import Progress

if TYPE_CHECKING:
    from xdit_core.plan import Plan
    from xdit_core.points.request import Job, Output


class Writer(Observer):
    """Writes each output as soon as this rank has it.

    Args:
        rank: number of this rank.
        run_folder: folder for results that cannot be written to their own path.
        kept: results that existed before the run and stay.
    """

    def __init__(
        self,
        plan: Plan,
        rank: int,
        progress: Progress,
        beat: HeartbeatWriter,
        run_folder: Path,
        kept: Collection[Path] = (),
    ) -> None:
        self.plan, self.rank, self.progress, self.beat = plan, rank, progress, beat
        self.run_folder, self.load_seconds = run_folder, 0.0
        self.files = targets(plan.run, plan.facts.video)
        self._settled = set(kept)
        self._failures: list[tuple[Path, str]] = []

    def engine_built(self, seconds: float) -> None:
        """Store how many seconds loading took, which is written beside each result."""
        self.load_seconds = seconds

    def job_started(self, job: Job) -> None:
        """Show the next prompt."""
        many = len(self.plan.run.prompt)
        self.progress.begin(job.prompt if many == 1 else f"{job.index + 1} of {many}: {job.prompt}")

    def output_done(self, output: Output) -> None:
        """Write an output, or a part of one: pictures have a file each, latents one for all."""
        self.progress.end()
        paths = self.files[output.index]
        if output.latents is not None and len(output.numbers) < self.plan.run.images:
            return  # the other pictures of this prompt are on other ranks, see `rest`
        if output.latents is None:
            paths = paths[output.numbers.start : output.numbers.stop]
        self._settled |= set(paths)
        seconds = {"load": self.load_seconds, **output.seconds}
        shown = ", ".join(f"{name} {value:.1f}" for name, value in output.seconds.items())
        shown += f"; loading took {self.load_seconds:.1f} s before"
        for op, times in output.slow.items():
            print(f"slow path: {op} needed the whole picture {times} times, and every stage waited", flush=True)
        for i, path in enumerate(paths):
            self.beat.status(Status(Phase.WRITING, str(path)))
            if self._write(output, i, path, seconds):
                print(f"{printable(str(path))}  {sum(output.seconds.values()):.1f} s ({shown})", flush=True)

    def _write(self, output: Output, i: int, path: Path, seconds: dict[str, float]) -> bool:
        """Write a result to its own path, or else to another folder; return whether its own path worked.

        Raises:
            XditError: no folder has room for it.
        """
        peak = self.progress.peak()
        try:
            results.write(output, i, path, self.plan, seconds, peak_bytes=peak)
        except OSError as error:
            why = f"{error.filename or path} cannot be written: {error.strerror or error}"
            try:
                spare = results.write_elsewhere(output, i, path, self.plan, seconds, self.run_folder)
            except OSError as second:
                raise XditError(
                    f"{why}; neither can {second.filename}, and this picture is lost; make room, or choose another "
                    "disk with out=."
                ) from error
            self._failures.append((path, f"{why}; the result is in {spare}"))
            print(printable(self._failures[-1][1]), flush=True)
            return False
        self.beat.wrote(1)
        return True

    def rest(self, output: Output) -> None:
        """Finish on rank 0: write latents that came in parts, and report what other ranks wrote."""
        others = set(self.files[output.index]) - self._settled
        if self.rank or not others:
            return
        if output.latents is not None:
            self.output_done(output)
        else:
            for path in sorted(others):
                print(f"{printable(str(path))}  by another rank", flush=True)

    def check(self) -> None:
        """Check that all results were written to their own paths.

        Raises:
            XditError: names the other paths.
        """
        if self._failures:
            path, why = self._failures[0]
            self.beat.status(Status(Phase.WRITING, str(path)))
            more = f" ({len(self._failures) - 1} more in the log)" if self._failures[1:] else ""
            raise XditError(f"{why}{more}; make room, or choose another place with out=.")
