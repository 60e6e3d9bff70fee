"""Make the folders of runs, each of which says what was run and when, and delete old ones and nothing else."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import socket
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xdit_core.errors import UsageError
from xdit_core.filesystem import atomically, make_folder, user_path, write_text
from xdit_core.observe.status import Phase
from xdit_core.outputs.metadata import embedded_settings, is_json_of
from xdit_core.worker.heartbeat import read_heartbeat

if TYPE_CHECKING:
    from xdit_core.plan import Plan

COMMAND = "command.json"  # what was run, where and when
QUEUED = "queued"  # a file of this name says that the run is still to begin, after its launcher has ended
NAME = re.compile(r"\d{8}-\d{6}-.+")
OWN_FILES = re.compile(
    rf"plan\.json|{re.escape(COMMAND)}|{QUEUED}|record|trace\.json|summary\.txt|timeline\.png|slurm\.(json|out)"
    r"|nccl-rank\d+(\.pipe)?"  # what NCCL had issued, and where it listens for who asks for that
    r"|rank\d+\.(log|beat|error\.json|record\.npz|trace\.json|profile\.json)|\.xdit-[0-9a-f]{12}"
)
OWN_FOLDERS = ("serial", "reference", "plan")  # of `verify`; each is the folder of a run
FRESH = 3600.0  # seconds since the last heartbeat within which a run may still go on
UNKNOWN = 86400.0  # the same, of a folder that does not say who runs it


@contextlib.contextmanager
def run_folder(plan: Plan, command: Sequence[str]) -> Iterator[Path]:
    """Make a folder for the plan and the logs of a run, and delete those older than the last ``keep_runs``.

    Args:
        command: the words of the command line.

    Raises:
        UsageError: it cannot be made.
    """
    parent = user_path(plan.run.runs, "runs=").absolute()
    make_folder(parent, "runs", plan.run.runs)
    folder = new_folder(parent, f"{time.strftime('%Y%m%d-%H%M%S')}-{plan.model}", plan.run.runs)
    about = {
        "command": shlex.join(command),
        "folder": os.getcwd(),
        "started": now(),
        "host": socket.gethostname(),
        "process": os.getpid(),
    }
    write_text(folder / COMMAND, json.dumps(about, indent=1, ensure_ascii=False) + "\n", "runs")
    remove_old(parent, plan.run.keep_runs)
    try:
        yield folder
    finally:
        if not (folder / QUEUED).exists():
            note_end(folder)


@contextlib.contextmanager
def queued(folder: Path, ends: bool) -> Iterator[None]:
    """Keep a run folder while the run waits in a queue, where it may begin after its launcher has ended.

    The folder stays until `note_end`.

    Args:
        ends: the run is over when the block ends.
    """
    mark = folder / QUEUED
    mark.touch()
    try:
        yield
    except BaseException:
        mark.unlink(missing_ok=True)
        raise
    if ends:
        mark.unlink(missing_ok=True)


def new_folder(parent: Path, name: str, runs: str) -> Path:
    """Make a folder of that name, or of that name with a number after it.

    Args:
        runs: the parent folder as the user wrote it.

    Raises:
        UsageError: there are too many.
    """
    for n in range(1, 1000):
        folder = parent / (name if n == 1 else f"{name}-{n}")
        try:
            folder.mkdir()
        except FileExistsError:  # another run of this second
            continue
        return folder
    raise UsageError(f"runs={runs} already holds 999 runs of this second; choose another folder with runs=.")


def now() -> str:
    """The time here, as ISO 8601 with its zone."""
    return datetime.now().astimezone().isoformat()


def note_end(folder: Path) -> None:
    """Note in the run folder that the run has ended; if that fails, the folder only stays longer."""
    about = read_command(folder)
    with contextlib.suppress(OSError), atomically(folder / COMMAND) as temporary:
        (folder / QUEUED).unlink(missing_ok=True)
        temporary.write_text(
            json.dumps({**about, "ended": now()}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )


def read_command(folder: Path) -> dict[str, Any]:
    """What a run folder says of its run, an empty mapping if it says nothing."""
    try:
        about = json.loads((folder / COMMAND).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return about if isinstance(about, dict) else {}


def remove_old(parent: Path, keep: int) -> list[Path]:
    """Delete all run folders in a folder but the newest.

    A folder stays if its run may still go on, if it holds anything that a run does not write there, or if it is a link.

    Args:
        keep: how many of them stay; 0 keeps all.

    Returns:
        The folders that were deleted.
    """
    if keep < 1:
        return []
    removed = []
    with os.scandir(parent) as entries:
        folders = [Path(e.path) for e in entries if NAME.fullmatch(e.name) and e.is_dir(follow_symlinks=False)]
    for folder in sorted(filter(is_run_folder, folders), key=age)[:-keep]:
        with contextlib.suppress(OSError):  # another launcher deletes it as well, or the folder is another user's
            files = own_files(folder)
            if files is None or may_run(folder):
                continue
            for path in files:
                path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
            folder.rmdir()  # fails if something has come in meanwhile
            removed.append(folder)
    return removed


def is_run_folder(folder: Path) -> bool:
    """Whether a folder is that of a run: it says which, or holds its plan."""
    return bool(read_command(folder)) or (folder / "plan.json").is_file()


def age(folder: Path) -> tuple[str, str, int, str]:
    """A key that sorts run folders by the time at which they were made; their numbers may have been used again."""
    number = re.fullmatch(r".*-(\d+)", folder.name)
    return folder.name[:15], str(read_command(folder).get("started", "")), int(number[1]) if number else 1, folder.name


def own_files(folder: Path, inner: bool = False) -> list[Path] | None:
    """Everything in a run folder, each folder after its contents; None if a run did not write all of it.

    A result in the folder itself is not counted as the run's: it was put there because there was room nowhere else.

    Args:
        inner: it is a folder of `verify`, whose results are there for the comparison only.
    """
    paths: list[Path] = []
    for path in sorted(folder.iterdir()):
        mode = path.lstat().st_mode
        own = OWN_FILES.fullmatch(path.name)
        if (own and stat.S_ISFIFO(mode)) or (stat.S_ISREG(mode) and (own or (inner and is_result(path)))):
            paths.append(path)
        elif stat.S_ISDIR(mode) and not inner and path.name in OWN_FOLDERS:
            within = own_files(path, inner=True)
            if within is None:
                return None
            paths += [*within, path]
        else:
            return None
    return paths


def is_result(path: Path) -> bool:
    """Whether a file is a result with the settings of a run inside, or the JSON beside one."""
    if path.suffix == ".json":
        return any(is_json_of(path, other) for other in path.parent.glob(f"{path.stem}.*") if other != path)
    return embedded_settings(path) is not None


def may_run(folder: Path) -> bool:
    """Whether the run of a folder, or its launcher, may still be at work."""
    about = read_command(folder)
    inner = [folder, *(folder / name for name in OWN_FOLDERS)]
    if any((each / QUEUED).exists() for each in inner):
        return True
    if "ended" in about:
        return False
    if about and (about.get("host") != socket.gethostname() or launcher_lives(about)):
        return True
    beats = [path for each in inner for path in each.glob("rank*.beat")]
    return any(map(is_fresh, beats)) or (not about and time.time() - newest(folder) < UNKNOWN)


def launcher_lives(about: Mapping[str, Any]) -> bool:
    """Whether the process that made a run folder still runs, and is not a later one of the same number."""
    import psutil  # type: ignore[import-untyped]

    try:
        started = datetime.fromisoformat(str(about["started"])).timestamp()
        return bool(psutil.Process(int(about["process"])).create_time() <= started + 2)
    except psutil.AccessDenied:
        return True
    except (psutil.Error, KeyError, TypeError, ValueError):
        return False


def is_fresh(beat: Path) -> bool:
    """Whether a heartbeat file is of a rank that has moved recently and is not done.

    The clock of this machine decides, or the time of the file.
    """
    heartbeat = read_heartbeat(beat)
    if heartbeat is None or heartbeat.status.phase == Phase.DONE:
        return False
    with contextlib.suppress(FileNotFoundError):
        return 0 <= time.monotonic() - heartbeat.at < FRESH or time.time() - beat.stat().st_mtime < FRESH
    return False


def newest(folder: Path) -> float:
    """The time of the last change in a folder, in seconds since 1970."""
    return max((path.lstat().st_mtime for path in (folder, *folder.rglob("*"))), default=0.0)
