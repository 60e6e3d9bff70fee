"""One rank of a run: ``python -m xdit_core.worker plan.json``, under any launcher.

It reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT as torchrun sets them; without WORLD_SIZE it is alone. The
folder of the plan is the run folder; there the rank keeps ``rank{n}.beat`` and, if it fails, ``rank{n}.error.json``,
written before anything is torn down: peers fail soon after, and only the time of writing tells the cause from its victims.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from xdit_core import machine, outputs
from xdit_core.beat import Beat, beat_path
from xdit_core.errors import UsageError, XditError
from xdit_core.failure import WRITING, error_path, failure
from xdit_core.filesystem import atomically
from xdit_core.place import Place, connect, die_with
from xdit_core.plan import Plan, same_plan
from xdit_core.result_names import targets
from xdit_core.screen import Progress, Tee

if TYPE_CHECKING:
    from xdit_core.engine import Engine
    from xdit_core.jobs import Job, Output


def quieten() -> None:
    """Libraries keep their bars, advertisements and warnings to themselves; must run before they are imported."""
    for key, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "DIFFUSERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TQDM_DISABLE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }.items():
        os.environ.setdefault(key, value)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def device_type(plan: Plan) -> str:
    """``cuda`` or ``cpu``."""
    import torch

    return plan.run.device or ("cuda" if torch.cuda.is_available() else "cpu")


def take_device(plan: Plan, place: Place) -> None:
    """This rank's GPU, or its share of the cores.

    Raises:
        UsageError: there is no GPU, or not one for each rank.
    """
    import torch

    torch.set_num_threads(plan.run.threads or max(1, machine.cores() // place.local_world))
    if device_type(plan) != "cuda":
        return
    if not torch.cuda.is_available():
        raise UsageError("device=cuda but torch finds no GPU here; use device=cpu, or install torch with CUDA.")
    if place.local_rank >= torch.cuda.device_count():
        raise UsageError(
            f"{place.local_world} processes on {place.address or 'this machine'} but only {torch.cuda.device_count()} GPUs; "
            "lower the degrees or nproc, or use device=cpu."
        )
    torch.cuda.set_device(place.local_rank)


def work(plan: Plan, place: Place, beat: Beat, folder: Path) -> None:
    """Load, draw every prompt, write what this rank owns, leave."""
    with screens(place) as progress:
        progress.status("starting")
        beat.doing("importing torch")
        take_device(plan, place)
        import torch.distributed as dist

        same_plan(plan)
        if place.world > 1:
            beat.doing("waiting for the other ranks to start")
            connect(place, plan.digest(), device_type(plan), plan.run.patience)
        beat.doing("importing diffusers")
        import diffusers  # noqa: F401  the engine would import it, but this is not the time of loading

        from xdit_core.engine import Engine
        from xdit_core.trace import tracing
        from xdit_core.verify import recording

        progress.status(f"loading {plan.model}")
        engine = Engine(plan, progress=progress, doing=beat.doing)
        write = Writer(plan, engine, progress, beat)
        with recording(engine, folder, write.title, write) as (started, done), tracing(engine, folder):
            for output in engine.generate_all(plan.run.prompt, done, started):
                write.rest(output)
        engine.close()
        if dist.is_initialized():
            beat.doing("waiting for the other ranks to finish")
            dist.barrier()
            dist.destroy_process_group()
        if place.rank == 0:
            beat.doing("writing the contact sheet")
            if line := outputs.write_sheet(plan.run, write.files):
                print(line, flush=True)
        beat.doing("done")


class Writer:
    """Writes each output as soon as this rank has it, so that a later failure loses nothing."""

    def __init__(self, plan: Plan, engine: Engine, progress: Progress, beat: Beat) -> None:
        self.plan, self.engine, self.progress, self.beat = plan, engine, progress, beat
        self.files = targets(plan.run, plan.facts.video)
        self._written: set[Path] = set()

    def title(self, job: Job) -> None:
        """Another prompt begins."""
        many = len(self.plan.run.prompt)
        self.progress.begin(job.prompt if many == 1 else f"{job.index + 1} of {many}: {job.prompt}")

    def __call__(self, output: Output) -> None:
        """An output, or a part of one: pictures have a file each, latents one for all."""
        self.progress.end()
        paths = self.files[output.index]
        if output.latents is not None and len(output.numbers) < self.plan.run.images:
            return  # the other pictures of this prompt are on other ranks, see `rest`
        if output.latents is None:
            paths = paths[output.numbers.start : output.numbers.stop]
        self._written |= set(paths)
        self.beat.doing(f"{WRITING}{paths[0]}")
        seconds = {"load": self.engine.load_seconds, **output.seconds}
        outputs.write(output, paths, self.plan, seconds, peak_bytes=self.progress.peak())
        shown = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
        for op, times in self.engine.rank.slow.items():
            print(f"slow path: {op} needed the whole picture {times} times, and every stage waited", flush=True)
        for path in paths:
            print(f"{path}  {sum(output.seconds.values()):.1f} s ({shown})", flush=True)

    def rest(self, output: Output) -> None:
        """On rank 0, when all is done: latents of one prompt that came in parts, and a word on what other ranks wrote."""
        others = set(self.files[output.index]) - self._written
        if self.engine.rank.mesh.rank or not others:
            return
        if output.latents is not None:
            self(output)
        else:
            for path in sorted(others):
                print(f"{path}  by another rank", flush=True)


@contextlib.contextmanager
def screens(place: Place) -> Iterator[Progress]:
    """The progress line of rank 0, and its prints on the terminal as well as in its log."""
    if place.rank:
        yield Progress(None)
        return
    if len(place.screen) != 2:
        yield Progress(sys.stderr)
        return
    # left open: closing would complain about a terminal that has gone
    out, err = (os.fdopen(fd, "w", encoding="utf-8", errors="replace", closefd=False) for fd in place.screen)
    progress, own = Progress(err), sys.stdout
    sys.stdout = Tee(own, out, before=progress.clear)
    try:
        yield progress
    finally:
        progress.clear()
        sys.stdout = own


def leave(error: BaseException, place: Place, beat: Beat, folder: Path) -> NoReturn:
    """Say what happened and end at once: waiting for peers that wait for this rank would hang."""
    about = failure(error, place.rank, beat.now)
    with contextlib.suppress(OSError), atomically(error_path(folder, place.rank)) as temporary:
        temporary.write_text(json.dumps(about, indent=1))
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(about["traceback"])
        sys.stderr.flush()
        sys.stdout.flush()
    os._exit(about["exit_code"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one rank; ends the process with the exit code on a failure."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if len(words) != 1:
        sys.exit("usage: python -m xdit_core.worker plan.json")
    path = Path(words[0])
    try:
        plan = Plan.from_json(path.read_text(encoding="utf-8"))
        place = Place.of(os.environ, plan.world)
    except (OSError, ValueError, TypeError, KeyError) as error:
        sys.exit(f"{path} cannot be read as a plan ({error}); write one with xdit-launch --dry-run --json.")
    except XditError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    die_with(place.parent)
    if place.parent is not None:
        faulthandler.enable()
        faulthandler.register(signal.SIGUSR1, all_threads=True)  # the launcher asks a hung rank where it is
    quieten()
    folder = path.resolve().parent
    with contextlib.suppress(OSError):
        error_path(folder, place.rank).unlink(missing_ok=True)
    beat = Beat(beat_path(folder, place.rank))
    try:
        work(plan, place, beat, folder)
    except KeyboardInterrupt:
        os._exit(130)
    except BaseException as error:  # SystemExit too: whoever calls sys.exit in a plugin must not leave the peers waiting
        leave(error, place, beat, folder)


if __name__ == "__main__":
    main()
