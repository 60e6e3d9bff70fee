"""The connection to an agent through the stdin and stdout of a program such as ssh or srun."""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from xdit_core.errors import UsageError
from xdit_launcher.cluster.protocol import MARK, SILENCE, Deliver, read_message

Explain = Callable[[int, Sequence[str], str, bool], str]
"""Makes a sentence about a program that ended, from its exit code, its last lines, the name of the host, and whether
its agent had said anything."""


class PipeConnection:
    """A program whose stdin and stdout lead to an agent.

    Args:
        command: the program with its arguments.
        number: of the host.
        name: of the host.
        deliver: takes the messages of the agent.
        explain: makes the reason that is delivered when the program ends.

    Raises:
        UsageError: there is no such program.
    """

    silence = SILENCE

    def __init__(self, command: Sequence[str], number: int, name: str, deliver: Deliver, explain: Explain) -> None:
        self.number, self.name, self.deliver, self.explain = number, name, deliver, explain
        self._heard = False  # the agent has said something
        self._last_lines: deque[str] = deque(maxlen=20)  # of what is no message
        self._lock = threading.Lock()
        try:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
            )
        except OSError as error:
            raise UsageError(
                f"{command[0]} cannot be started: {error.strerror}; install it, or name another program."
            ) from error
        self._error_reader = threading.Thread(target=self._read_errors, daemon=True)
        self._error_reader.start()
        threading.Thread(target=self._read, daemon=True).start()

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a request as a line."""
        with self._lock, contextlib.suppress(OSError, ValueError):
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()

    def close(self) -> None:
        """Close stdin, which ends the agent; a program that hangs is killed."""
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
            message = read_message(text.partition(MARK)[2]) if MARK in text else None
            if message is None:
                self._last_lines.append(text.strip())
                continue
            self._heard = True
            self.deliver(self.number, message)
        code = self.process.wait()
        self._error_reader.join(1)
        self.deliver(self.number, {"gone": self.explain(code, list(self._last_lines), self.name, self._heard)})

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if text := line.decode("utf-8", "replace").strip():
                self._last_lines.append(text)
