"""The way to agents through the stdin and stdout of a program such as ssh or srun."""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from xdit_core.errors import UsageError
from xdit_launcher.cluster.fleet import Deliver
from xdit_launcher.node.agent import MARK

Why = Callable[[int, Sequence[str], str, bool], str]


class Pipe:
    """A process whose stdin and stdout lead to an agent.

    Args:
        command: what to start.
        number, name: of the host.
        deliver: takes what is said.
        why: a sentence about the end: exit code of the program, its last lines, the host, whether its agent had said
            something.

    Raises:
        UsageError: there is no such program.
    """

    def __init__(self, command: Sequence[str], number: int, name: str, deliver: Deliver, why: Why) -> None:
        self.number, self.name, self.deliver, self.why, self.heard = number, name, deliver, why, False
        self.said: deque[str] = deque(maxlen=20)  # last lines that are not ours
        self._lock = threading.Lock()
        try:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
            )
        except OSError as error:
            raise UsageError(
                f"{command[0]} cannot be started: {error.strerror}; install it, or name another program."
            ) from error
        self._errors = threading.Thread(target=self._read_errors, daemon=True)
        self._errors.start()
        threading.Thread(target=self._read, daemon=True).start()

    def send(self, message: Mapping[str, Any]) -> None:
        """A request as a line."""
        with self._lock, contextlib.suppress(OSError, ValueError):
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()

    def close(self) -> None:
        """The end of stdin ends the agent; a way that hangs is cut."""
        with contextlib.suppress(OSError, ValueError):
            assert self.process.stdin is not None
            self.process.stdin.close()
        try:
            self.process.wait(3)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            text = line.decode("utf-8", "replace")
            message = read(text.partition(MARK)[2]) if MARK in text else None
            if message is None:
                self.said.append(text.strip())
                continue
            self.heard = True
            self.deliver(self.number, message)
        code = self.process.wait()
        self._errors.join(1)
        self.deliver(self.number, {"gone": self.why(code, list(self.said), self.name, self.heard)})

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if text := line.decode("utf-8", "replace").strip():
                self.said.append(text)


def read(text: str) -> dict[str, Any] | None:
    """A line of JSON that is a map, None if it is something else."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
