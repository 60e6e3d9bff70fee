"""One rank of a run: ``python -m xdit_core.worker plan.json``, under any launcher that sets RANK, WORLD_SIZE and so on as torchrun does.

The folder of the plan is the run folder; there the rank keeps ``rank{n}.beat`` and, if it fails, ``rank{n}.error.json``, written before
anything is torn down: peers fail soon after, and only the time of writing tells the cause from its victims.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from xdit_core import machine, outputs
from xdit_core.beat import Beat, beat_path
from xdit_core.errors import UsageError, XditError
from xdit_core.plan import Plan, same_plan
from xdit_core.records import listed
from xdit_core.screen import Progress, Tee

if TYPE_CHECKING:
    from torch.distributed import Store

OUT_OF_MEMORY = 137  # what a shell reports for a process that the kernel's out-of-memory killer ended
LOST_PEER = ("connection closed by peer", "connection reset by peer", "broken pipe", "timed out waiting", "application timeout")
NO_MEMORY = ("defaultcpuallocator", "out of memory", "can't allocate memory", "cannot allocate memory")


@dataclass(frozen=True)
class Place:
    """Where a process stands among the others.

    Args:
        address, port: of the store, which rank 0 serves.
        listen: file descriptor on which the launcher already listens for rank 0, so that no port can be lost to others.
        screen: file descriptors of the terminal's stdout and stderr, if the process' own go to a log.
        parent: process id of the launcher.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    address: str = ""
    port: int = 0
    listen: int | None = None
    screen: tuple[int, ...] = ()
    parent: int | None = None

    @staticmethod
    def of(env: Mapping[str, str], world: int) -> Place:
        """From the environment; without WORLD_SIZE the process is alone.

        Raises:
            UsageError: the environment does not fit a plan for ``world`` ranks.
        """
        by_hand = f"torchrun --nproc-per-node {world} -m xdit_core.worker plan.json"
        found = env.get("WORLD_SIZE", "1")
        if found != str(world):
            raise UsageError(f"the plan needs {world} processes but WORLD_SIZE is {found}; start it with {by_hand}.")
        if "WORLD_SIZE" not in env:
            return Place()
        try:
            rank, local_rank = int(env["RANK"]), int(env.get("LOCAL_RANK", "0"))
            local_world, port = int(env.get("LOCAL_WORLD_SIZE", found)), int(env.get("MASTER_PORT", "0"))
        except (KeyError, ValueError) as error:
            raise UsageError(f"RANK, LOCAL_RANK and MASTER_PORT must be numbers ({error}); start it with {by_hand}.") from error
        screen = tuple(int(fd) for fd in env.get("XDIT_SCREEN", "").split(",") if fd)
        listen = env.get("XDIT_LISTEN")
        parent = env.get("XDIT_PARENT")
        return Place(
            rank=rank,
            world=world,
            local_rank=local_rank,
            local_world=local_world,
            address=env.get("MASTER_ADDR", ""),
            port=port,
            listen=int(listen) if listen else None,
            screen=screen,
            parent=int(parent) if parent else None,
        )


def die_with(parent: int | None) -> None:
    """End this process when its launcher ends, however that happens. Without a known launcher nothing is done.

    Args:
        parent: the launcher's process id.
    """
    if parent is None:
        return
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != parent:  # it had died before the call above
            os._exit(1)
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


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


def connect(plan: Plan, place: Place) -> Store:
    """Meet the other ranks and form the default process group, after making sure that all run the same plan.

    Raises:
        XditError: they do not.
    """
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    # Somewhat more than the launcher waits: it knows what every rank is doing and writes the better report.
    patience = timedelta(seconds=plan.run.timeout + 10)
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun serves the store itself
    store: Store = dist.TCPStore(
        place.address,
        place.port,
        place.world,
        is_master=place.rank == 0 and not agent,
        timeout=patience,
        wait_for_workers=False,
        master_listen_fd=place.listen if place.rank == 0 else None,
    )
    store = dist.PrefixStore("xdit", store)
    compare(store, plan.digest(), place, patience)
    dist.init_process_group(
        backend="nccl" if device_type(plan) == "cuda" else "gloo",
        store=store,
        rank=place.rank,
        world_size=place.world,
        timeout=patience,
        device_id=torch.device("cuda", torch.cuda.current_device()) if device_type(plan) == "cuda" else None,
    )
    return store


def compare(store: Store, digest: str, place: Place, patience: Any) -> None:
    """Ranks with different plans would wait for each other for ever, or compute something else without a word.

    Raises:
        XditError: names the ranks that differ from rank 0.
    """
    keys = [f"digest/{rank}" for rank in range(place.world)]
    store.set(keys[place.rank], digest)
    store.wait(keys, patience)
    found = [store.get(key).decode() for key in keys]
    other = [rank for rank, value in enumerate(found) if value != found[0]]
    if other:
        raise XditError(
            f"{'ranks' if len(other) > 1 else 'rank'} {listed(other)} of {place.world} got another plan than rank 0; "
            "copy one plan.json to every node and start all ranks again."
        )


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


def work(plan: Plan, place: Place, beat: Beat) -> None:
    """Load, draw every prompt, write what this rank owns, leave."""
    with screens(place) as progress:
        progress.status("starting")
        beat.doing("importing torch")
        take_device(plan, place)
        import torch.distributed as dist

        same_plan(plan)
        if place.world > 1:
            beat.doing("waiting for the other ranks to start")
            connect(plan, place)
        from xdit_core.engine import Engine

        progress.status(f"loading {plan.model}")
        engine = Engine(plan, progress=progress, doing=beat.doing)
        files = outputs.targets(plan.run)
        for i, prompt in enumerate(plan.run.prompt):
            progress.begin(prompt if len(plan.run.prompt) == 1 else f"{i + 1} of {len(plan.run.prompt)}: {prompt}")
            output = engine.generate(prompt)
            progress.end()
            if not engine.owner:
                continue
            beat.doing(f"writing {files[i][0]}")
            seconds = {"load": engine.load_seconds, **output.seconds}
            outputs.write(output, files[i], plan, seconds, peak_bytes=progress.peak())
            shown = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
            for path in files[i]:
                print(f"{path}  {sum(output.seconds.values()):.1f} s ({shown})", flush=True)
        engine.close()
        if dist.is_initialized():
            beat.doing("waiting for the other ranks to finish")
            dist.barrier()
            dist.destroy_process_group()
        beat.doing("done")


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
    out, err = (open(fd, "w", encoding="utf-8", errors="replace", closefd=False) for fd in place.screen)
    progress, own = Progress(err), sys.stdout
    sys.stdout = Tee(own, out, before=progress.clear)
    try:
        yield progress
    finally:
        progress.clear()
        sys.stdout = own


def chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was raised from."""
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)


def lost_peer(error: BaseException) -> bool:
    """Another rank went away or did not answer: this rank is not the cause."""
    for e in chain(error):
        names = {cls.__name__ for cls in type(e).__mro__}
        if names & {"DistNetworkError", "DistStoreError", "DistBackendError"}:
            return True
        if isinstance(e, RuntimeError) and any(words in str(e).lower() for words in LOST_PEER):
            return True
    return False


def failure(error: BaseException, place: Place, doing: str) -> dict[str, Any]:
    """What the launcher needs for its report.

    Returns:
        Among others ``known`` (the message is a sentence for the user), ``victim`` (see ``lost_peer``) and ``exit_code``.
    """
    message, code = str(error).strip() or type(error).__name__, 1
    known = isinstance(error, XditError)
    if isinstance(error, XditError):
        code = error.exit_code
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) and error.code else 1
        message, known = f"the process left with exit code {error.code} before its work was done", True
    if any(isinstance(e, MemoryError) or any(words in str(e).lower() for words in NO_MEMORY) for e in chain(error)):
        code, known = OUT_OF_MEMORY, True
        message = (
            f"out of memory ({message.splitlines()[0][:160]}); lower height, width or images, use dtype=bfloat16, "
            "or divide the model over more processes with --plugins pipefusion."
        )
    return {
        "rank": place.rank,
        "host": socket.gethostname(),
        "doing": doing,
        "type": type(error).__name__,
        "message": message,
        "known": known,
        "victim": code != OUT_OF_MEMORY and not isinstance(error, SystemExit) and lost_peer(error),
        "exit_code": code,
        "monotonic": time.monotonic(),
        "wall": time.time(),
        "traceback": "".join(traceback.format_exception(error)),
    }


def leave(error: BaseException, place: Place, beat: Beat, folder: Path) -> NoReturn:
    """Say what happened and end at once: waiting for peers that wait for this rank would hang."""
    about = failure(error, place, beat.now)
    with contextlib.suppress(OSError), outputs.atomically(error_path(folder, place.rank)) as temporary:
        temporary.write_text(json.dumps(about, indent=1))
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(about["traceback"])
        sys.stderr.flush()
        sys.stdout.flush()
    os._exit(about["exit_code"])


def error_path(folder: Path, rank: int) -> Path:
    """Where a rank tells of its failure."""
    return folder / f"rank{rank}.error.json"


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
        work(plan, place, beat)
    except KeyboardInterrupt:
        os._exit(130)
    except BaseException as error:  # SystemExit too: whoever calls sys.exit in a plugin must not leave the peers waiting
        leave(error, place, beat, folder)


if __name__ == "__main__":
    main()
