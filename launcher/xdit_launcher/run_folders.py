"""The folders of runs: each says what was run and when; old ones are deleted, and nothing else ever is."""

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
    r"|rank\d+\.(log|beat|error\.json|record\.npz|trace\.json|profile\.json)|\.xdit-[0-9a-f]{12}"
)
OWN_FOLDERS = ("serial", "reference", "plan")  # of `verify`; each is the folder of a run
FRESH = 3600.0  # seconds since the last sign of life within which a run may still go on
UNKNOWN = 86400.0  # the same, of a folder that does not say who runs it


@contextlib.contextmanager
def run_folder(plan: Plan, command: Sequence[str]) -> Iterator[Path]:
    """A new folder for the plan and the logs of a run; older ones than the last ``keep_runs`` are deleted.

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
    """Around handing a run over to a queue, from which it may begin when its launcher has gone: until `note_end` its
    folder stays.

    Args:
        ends: the run is over when the block is.
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


def new_folder(parent: Path, name: str, given: str) -> Path:
    """A folder of that name, or of one with a number behind it.

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
    raise UsageError(f"runs={given} is full of runs of this second; choose another folder with runs=.")


def now() -> str:
    """The time here, as ISO 8601 with its zone."""
    return datetime.now().astimezone().isoformat()


def note_end(folder: Path) -> None:
    """Write down that the run has ended; if that fails, the folder only stays longer."""
    about = read_command(folder)
    with contextlib.suppress(OSError), atomically(folder / COMMAND) as temporary:
        (folder / QUEUED).unlink(missing_ok=True)
        temporary.write_text(
            json.dumps({**about, "ended": now()}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )


def read_command(folder: Path) -> dict[str, Any]:
    """What a run folder says of its run; nothing if it says nothing."""
    try:
        found = json.loads((folder / COMMAND).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def remove_old(parent: Path, keep: int) -> list[Path]:
    """Delete the run folders in a folder but for the newest; 0 keeps all.

    A folder stays if its run may still go on, if it holds anything that a run does not write there, or if it is a link.

    Returns:
        What was deleted.
    """
    if keep < 1:
        return []
    removed = []
    with os.scandir(parent) as entries:
        found = [Path(e.path) for e in entries if NAME.fullmatch(e.name) and e.is_dir(follow_symlinks=False)]
    for folder in sorted(filter(is_run_folder, found), key=age)[:-keep]:
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
    """A run has been there: the folder says which, or holds its plan."""
    return bool(read_command(folder)) or (folder / "plan.json").is_file()


def age(folder: Path) -> tuple[str, str, int, str]:
    """What sorts run folders by the time at which they were made: within a second their numbers may have been used
    again."""
    number = re.fullmatch(r".*-(\d+)", folder.name)
    return folder.name[:15], str(read_command(folder).get("started", "")), int(number[1]) if number else 1, folder.name


def own_files(folder: Path, inner: bool = False) -> list[Path] | None:
    """Everything in a run folder, folders after what is in them; None if a run did not write all of it.

    A result in the folder itself was put there because there was room nowhere else, and is not counted as the run's.

    Args:
        inner: it is a folder of `verify`, whose results are there for the comparison only.
    """
    found: list[Path] = []
    for path in sorted(folder.iterdir()):
        mode = path.lstat().st_mode
        if stat.S_ISREG(mode) and (OWN_FILES.fullmatch(path.name) or (inner and is_result(path))):
            found.append(path)
        elif stat.S_ISDIR(mode) and not inner and path.name in OWN_FOLDERS:
            within = own_files(path, inner=True)
            if within is None:
                return None
            found += [*within, path]
        else:
            return None
    return found


def is_result(path: Path) -> bool:
    """A picture or the like with our settings inside, or the JSON beside it."""
    if path.suffix == ".json":
        return any(is_json_of(path, other) for other in path.parent.glob(f"{path.stem}.*") if other != path)
    return embedded_settings(path) is not None


def may_run(folder: Path) -> bool:
    """The run of a folder, or its launcher, may still be at work."""
    about = read_command(folder)
    inner = [folder, *(folder / name for name in OWN_FOLDERS)]
    if any((place / QUEUED).exists() for place in inner):
        return True
    if "ended" in about:
        return False
    if about and (about.get("host") != socket.gethostname() or launcher_lives(about)):
        return True
    beats = [path for place in inner for path in place.glob("rank*.beat")]
    return any(map(is_fresh, beats)) or (not about and time.time() - newest(folder) < UNKNOWN)


def launcher_lives(about: Mapping[str, Any]) -> bool:
    """The process that made a run folder is still there, and is no later one of the same number."""
    import psutil  # type: ignore[import-untyped]

    try:
        started = datetime.fromisoformat(str(about["started"])).timestamp()
        return bool(psutil.Process(int(about["process"])).create_time() <= started + 2)
    except psutil.AccessDenied:
        return True
    except (psutil.Error, KeyError, TypeError, ValueError):
        return False


def is_fresh(beat: Path) -> bool:
    """A rank that is not done has moved not long ago, by the clock of this machine or by the file's."""
    pulse = read_heartbeat(beat)
    if pulse is None or pulse.status.phase == Phase.DONE:
        return False
    with contextlib.suppress(FileNotFoundError):
        return 0 <= time.monotonic() - pulse.at < FRESH or time.time() - beat.stat().st_mtime < FRESH
    return False


def newest(folder: Path) -> float:
    """When something in a folder was last changed, in seconds since 1970."""
    return max((path.lstat().st_mtime for path in (folder, *folder.rglob("*"))), default=0.0)
