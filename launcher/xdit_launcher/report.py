"""Which rank to blame for a failed run, and how to say so in a few lines."""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from xdit_core.beat import beat_path, read_beat


@dataclass(frozen=True)
class Blame:
    """The cause of a failure.

    Args:
        doing: the last words of its beat.
        sentence: what went wrong.
        code: the exit code for the whole run.
    """

    rank: int
    host: str
    doing: str
    sentence: str
    code: int


def read_errors(folder: Path) -> list[dict[str, Any]]:
    """The error files of the ranks, the earliest first."""
    found = []
    for path in folder.glob("rank*.error.json"):
        try:
            found.append(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError):  # its disk may be what failed
            continue
    one_host = len({e["host"] for e in found}) == 1
    return sorted(found, key=lambda e: float(e["monotonic" if one_host else "wall"]))


def decided(folder: Path, codes: Sequence[int | None]) -> bool:
    """A cause is known, and not only ranks that lost their peers."""
    errors = read_errors(folder)
    told = {e["rank"] for e in errors}
    silent = any(code and (code < 0 or rank not in told) for rank, code in enumerate(codes))
    return silent or any(not e["victim"] for e in errors)


ELSEWHERE = "no rank of this node is the cause; the launcher of another node says what happened there"


def blame(folder: Path, codes: Sequence[int | None], stuck_for: float | None = None, alone: bool = True) -> Blame:
    """The cause: the earliest error of a rank's own, else a death by signal, else an exit without a word, else who is behind.

    Args:
        folder: the run folder.
        codes: exit codes by rank before anything was ended by the launcher; negative for signals, None for running.
        stuck_for: seconds without progress, if that is why the run is ended.
        alone: all ranks are those of this node.
    """
    errors = read_errors(folder)
    own = next((e for e in errors if not e["victim"]), None)
    if own is not None:
        return told(own)
    pulses = [read_beat(beat_path(folder, rank)) for rank in range(len(codes))]

    def silent(rank: int, sentence: str, code: int) -> Blame:
        pulse = pulses[rank]
        return Blame(rank, socket.gethostname(), pulse.doing if pulse else "starting", sentence, code)

    known = {e["rank"]: e for e in errors}
    for rank, code in enumerate(codes):
        if code is not None and code < 0:
            return silent(rank, by_signal(-code), 128 - code)
    for rank, code in enumerate(codes):
        if code and rank not in known:
            return silent(rank, f"it ended with exit code {code} and left no error", code)
    running = [rank for rank, code in enumerate(codes) if code != 0] or list(range(len(codes)))

    def progress(rank: int) -> tuple[bool, int, int]:
        pulse = pulses[rank]
        return (pulse.waiting, pulse.count, rank) if pulse else (False, 0, rank)

    last = min(running, key=progress)
    if stuck_for is not None:
        hint = "its stack is in the log; give a larger timeout= if it only is slow"
        return silent(last, f"no rank made progress for {stuck_for:g} s and this one is behind; {hint}", 1)
    if last in known:
        found = told(known[last])
        return found if alone else replace(found, sentence=f"it lost its connection to other ranks; {ELSEWHERE}")
    return silent(last, "the other ranks lost their connection and this one is behind", 1)


def told(error: dict[str, Any]) -> Blame:
    """From what a rank wrote itself."""
    text = " ".join(str(error["message"]).split("\nException raised from")[0].split())
    sentence = text if error["known"] else f"{error['type']}: {text}"
    return Blame(error["rank"], error["host"], error["doing"], sentence, error["exit_code"])


def by_signal(number: int) -> str:
    """A death by signal in words."""
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = "unknown"
    often = ", often the kernel's out-of-memory killer" if number == signal.SIGKILL else ""
    return f"it was killed by signal {number} ({name}){often}"


def lines(found: Blame, world: int, folder: Path) -> list[str]:
    """The report: who, doing what; why; where the logs are."""
    return [
        f"rank {found.rank} of {world} on {found.host} failed at: {found.doing}",
        f"  {found.sentence[:600]}",
        f"  log: {folder / f'rank{found.rank}.log'}" + (" (the others' beside it)" if world > 1 else ""),
    ]
