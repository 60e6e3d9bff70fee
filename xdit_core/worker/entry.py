"""Run one rank of a plan under any launcher: ``python -m xdit_core.worker plan.json``.

The process reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, as torchrun sets them; without WORLD_SIZE
it is the only rank. The folder of the plan is the run folder. There the rank keeps its heartbeat ``rank{n}.beat``, and
``rank{n}.error.json`` if it fails. It writes that file before it closes anything, because its peers fail soon after and
only the time of writing distinguishes the cause from its victims.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import gc
import json
import os
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from xdit_core import machine
from xdit_core.errors import UsageError, XditError
from xdit_core.filesystem import atomically, read_text
from xdit_core.observe.observer import Awaited, combined
from xdit_core.observe.status import Phase, Status
from xdit_core.outputs import results
from xdit_core.outputs.existing import FilesThere
from xdit_core.outputs.names import targets
from xdit_core.plan import Plan
from xdit_core.planning.planner import check_same_plan
from xdit_core.printable import printable
from xdit_core.worker.control import ControlLink
from xdit_core.worker.failure import error_path, failure
from xdit_core.worker.heartbeat import HeartbeatWriter, heartbeat_path, pace_of
from xdit_core.worker.progress import Progress, Tee
from xdit_core.worker.rendezvous import RankEnv, connect, die_with, everyones
from xdit_core.worker.restart import with_docstrings
from xdit_core.worker.writer import Writer

FLIGHTS = "2000"  # operations that NCCL's flight recorder keeps


def quieten() -> None:
    """Silence progress bars, advertisements and warnings of libraries; must run before they are imported."""
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


def fetch_weights(plan: Plan) -> None:
    """Fetch the weights from the hub: a plan of a dry run that is started by hand has fetched JSON files only."""
    from xdit_core.checkpoints import hub
    from xdit_core.checkpoints.weights import weight_files
    from xdit_core.registry.registry import Registry
    from xdit_core.settings import ModelSettings, build

    spec, _ = Registry().model(plan.model)
    where = build(ModelSettings, "model.", plan.values)
    if hub.on_hub(spec, where) and not weight_files(Path(plan.folder) / spec.checkpoint.denoiser, "diffusers"):
        hub.locate(spec, where)


def take_device(plan: Plan, place: RankEnv) -> None:
    """Take this rank's GPU, or its part of the CPU cores.

    Raises:
        UsageError: this machine has no GPU, or fewer than ranks.
    """
    import torch

    torch.set_num_threads(plan.run.threads or machine.threads(place.local_world))
    if plan.device != "cuda":
        return
    if not torch.cuda.is_available():
        raise UsageError("device=cuda but torch finds no GPU here; use device=cpu, or install torch with CUDA.")
    count, shared = torch.cuda.device_count(), machine.gpu_backend() in machine.SHARING
    if place.local_rank >= count and not shared:
        raise UsageError(
            f"{place.local_world} processes on {place.address or 'this machine'} but only {count} GPUs; lower the "
            "degrees or nproc, use device=cpu, or let ranks share a GPU with XDIT_BACKEND=gloo in the environment."
        )
    torch.cuda.set_device(place.local_rank % count)


def record_flights(folder: Path) -> None:
    """Let NCCL write what each rank had issued into the run folder when a collective times out, as ``nccl-rank{n}``."""
    prefix = str(folder / "nccl-rank")
    for key, value in {
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_NCCL_TRACE_BUFFER_SIZE": FLIGHTS,
        "TORCH_FR_BUFFER_SIZE": FLIGHTS,
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": prefix,
        "TORCH_FR_DUMP_TEMP_FILE": prefix,
        "TORCH_NCCL_DEBUG_INFO_PIPE_FILE": prefix,
    }.items():
        os.environ.setdefault(key, value)


def work(plan: Plan, place: RankEnv, beat: HeartbeatWriter, folder: Path) -> None:
    """Load the model, draw every prompt, write what this rank owns, and leave."""
    with screens(place) as progress:
        progress.show("starting")
        beat.status(Status(Phase.IMPORTING, "torch"))
        gc.disable()  # imports make nothing but what stays, and looking through it takes a fifth of their time
        take_device(plan, place)
        import torch.distributed as dist

        fetch_weights(plan)
        check_same_plan(plan)
        if place.control is not None:
            answer_requests(plan, place, place.control, beat)
            return
        files = FilesThere.here(plan) if plan.owns(place.rank) else FilesThere()
        if place.world > 1:
            store = connect(place, plan.digest(), plan.device, plan.run.patience, beat)
            files = files.with_others(everyones(store, "files", files.to_json(), place))
        if place.rank == 0:
            beat.wrote(len(files.kept))
            for line in files.lines(plan):
                progress.say(line)
        write = draw(plan, place.rank, progress, beat, folder, files) if files.left(plan) else None
        if dist.is_initialized():
            with beat.waiting(Awaited("the other ranks to finish")):
                dist.barrier()
                dist.destroy_process_group()
        if place.rank == 0:
            beat.status(Status(Phase.WRITING, "the contact sheet"))
            if line := results.write_sheet(plan.run, targets(plan.run, plan.facts.video)):
                print(printable(line), flush=True)
        if write is not None:
            write.check()  # not before the others are done
        beat.status(Status(Phase.DONE))


def answer_requests(plan: Plan, place: RankEnv, control: int, beat: HeartbeatWriter) -> None:
    """Load the model and answer requests until whoever started this rank ends it.

    Args:
        control: file descriptor of the control connection.
    """
    link = ControlLink(socket.socket(fileno=control))
    if place.world > 1:
        connect(place, plan.digest(), plan.device, plan.run.patience, beat)
    beat.status(Status(Phase.IMPORTING, "diffusers"))
    import diffusers  # noqa: F401
    import torch.distributed as dist

    from xdit_core.engine.engine import Engine
    from xdit_core.registry.registry import Registry
    from xdit_core.worker.service import Reporter, serve

    exempt_from_collection()
    reporter = Reporter(link, plan.owns(place.rank), Registry().model(plan.model)[0].latents.frame_dim)
    engine = Engine(plan, progress=False, observer=combined((beat, pace_of(plan, beat), reporter)))
    exempt_from_collection()
    serve(engine, link, reporter, beat)
    engine.close()
    if dist.is_initialized():
        dist.destroy_process_group()
    beat.status(Status(Phase.DONE))


def exempt_from_collection() -> None:
    """Collect garbage again, but not among what is there now: with the libraries and the model, that would stop a step
    for up to a second."""
    gc.freeze()
    gc.enable()


def draw(plan: Plan, rank: int, progress: Progress, beat: HeartbeatWriter, folder: Path, files: FilesThere) -> Writer:
    """Load the model and draw the results that do not exist yet."""
    beat.status(Status(Phase.IMPORTING, "diffusers"))
    import diffusers  # noqa: F401  the engine would import it, but this is not the time of loading

    from xdit_core.engine.engine import Engine
    from xdit_core.observe.recording import record_path, recording
    from xdit_core.observe.trace_files import tracing

    exempt_from_collection()
    progress.show(f"loading {plan.model}")

    write = Writer(plan, rank, progress, beat, folder, files.kept)
    engine = Engine(plan, progress=False, observer=combined((beat, pace_of(plan, beat), progress, write)))
    exempt_from_collection()
    record = recording(engine.recorder, record_path(folder, rank))
    with record, tracing(engine.trace, engine.rank, folder):
        for output in engine.generate_all(plan.run.prompt, skip=files.skipped(plan)):
            write.rest(output)
    engine.close()
    return write


@contextlib.contextmanager
def screens(place: RankEnv) -> Iterator[Progress]:
    """Make the progress line of rank 0, and show what it prints on the terminal as well as in its log."""
    if place.rank or place.control is not None:
        yield Progress(None)
        return
    if len(place.screen) != 2:
        yield Progress(sys.stderr)
        return
    # left open, because closing it fails if the terminal is closed
    out, err = (os.fdopen(fd, "w", encoding="utf-8", errors="replace", closefd=False) for fd in place.screen)
    progress, own = Progress(err, place.columns), sys.stdout
    sys.stdout = Tee(own, out, before=progress.clear)
    try:
        yield progress
    finally:
        progress.clear()
        sys.stdout = own


def leave(error: BaseException, place: RankEnv, beat: HeartbeatWriter, folder: Path) -> NoReturn:
    """Report what happened and end at once, because peers that wait for this rank would never answer."""
    about = failure(error, place.rank, beat.now)
    with contextlib.suppress(OSError), atomically(error_path(folder, place.rank)) as temporary:
        temporary.write_text(json.dumps(about, indent=1))
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(
            by_hand(about, place, folder) if place.parent is None else printable(about["traceback"], keep="\n")
        )
        sys.stderr.flush()
        sys.stdout.flush()
    os._exit(about["exit_code"])


def end() -> None:
    """End this process with exit code 0 without taking the libraries apart object by object, which takes a tenth of
    the time of a small run. Where threads still work, return, and the interpreter waits for them."""
    if any(not thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread()):
        return
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(0)


def by_hand(about: Mapping[str, Any], place: RankEnv, folder: Path) -> str:
    """Print the failure for a user who started this rank by hand: a sentence, and where the traceback is."""
    said = printable(" ".join(str(about["message"]).split()))
    if not about["known"]:
        said = f"{about['type']}: {said}"
        path = folder / f"rank{place.rank}.traceback.txt"
        try:
            path.write_text(about["traceback"], encoding="utf-8", errors="backslashreplace")
            said += f"; the traceback is in {printable(str(path))}"
        except OSError:
            said += "\n" + printable(about["traceback"], keep="\n").rstrip()
    if place.world > 1:
        status = printable(str(Status.from_dict(about["status"])))
        said = f"rank {place.rank} of {place.world} failed at: {status}\n  {said}"
    return said + "\n"


def read_plan(path: Path) -> tuple[Plan, RankEnv]:
    """Read the plan from a file, and this process' place in it from the environment.

    Raises:
        XditError: the file is not a plan, or the environment does not fit it.
    """
    fix = "write one with xdit-launch run --dry-run --json"
    text = read_text(path, f"the plan {path}", fix)
    try:
        plan = Plan.from_json(text)
        world = plan.world
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read as a plan ({type(error).__name__}: {error}); {fix}.") from error
    return plan, RankEnv.of(os.environ, world)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one rank; a failure ends the process with its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    with_docstrings("xdit_core.worker", words)
    if len(words) != 1:
        sys.exit("usage: python -m xdit_core.worker plan.json")
    path = Path(words[0])
    try:
        plan, place = read_plan(path)
    except XditError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    die_with(place.parent)
    if place.parent is not None:
        faulthandler.enable()
        faulthandler.register(
            signal.SIGUSR1, all_threads=True
        )  # the launcher sends this signal to a hung rank to get its stack
    quieten()
    folder = path.resolve().parent
    if plan.device == "cuda":
        record_flights(folder)
    with contextlib.suppress(OSError):
        error_path(folder, place.rank).unlink(missing_ok=True)
    beat = HeartbeatWriter(heartbeat_path(folder, place.rank))
    try:
        work(plan, place, beat, folder)
    except KeyboardInterrupt:
        os._exit(130)
    except BaseException as error:  # SystemExit too: a plugin that calls sys.exit must not leave the peers waiting
        leave(error, place, beat, folder)
    if plan.device == "cpu":  # a GPU's profiler writes its files when the interpreter ends as usual
        end()
