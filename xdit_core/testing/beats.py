"""For tests that wait until a rank draws."""

from __future__ import annotations

from pathlib import Path

from xdit_core.worker.heartbeat import read_heartbeat


def step_of(beat: Path) -> int:
    """The step that the rank of a beat file is at, counted from 1; 0 outside the steps."""
    heartbeat = read_heartbeat(beat)
    return heartbeat.status.step if heartbeat else 0
