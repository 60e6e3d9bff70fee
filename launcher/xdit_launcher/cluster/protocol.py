"""The messages between the launcher and the agents, and how long either side waits for the other.

Every message is one JSON object. Over a pipe each stands in a line of its own behind `MARK`.

- A request is ``{"do": NAME, "id": NUMBER, ...}``. The agent calls its method ``do_NAME`` with the other keys as
  arguments and answers ``{"did": NUMBER, "result": ...}``, or ``{"did": NUMBER, "failed": SENTENCE}``.
- ``{"do": "ping"}`` has no answer. It tells the agent that the launcher still runs.
- An agent tells by itself ``{"seen": {RANK: STATUS}, "wall": TIME}``, with the ranks whose status has changed and the
  time of day on its machine, and passes on what rank 0 prints: ``{"screen": 1 or 2, "data": BASE64}``.
- An agent passes on what its ranks say over their control connections: ``{"rank": RANK, "message": ...}``, see
  `xdit_core.worker.control`.
- A connection that has ended delivers ``{"gone": REASON}``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from xdit_core.observe.status import Status
from xdit_core.worker.heartbeat import Heartbeat
from xdit_launcher.node.root_cause import RankStatus

SILENCE = 10.0  # seconds without a message after which the other side counts as gone
ALIVE = 2.0  # seconds between signs of life
PATIENCE = 60.0  # seconds for an agent to start and answer
FAREWELL = 5.0  # seconds for an agent to end its processes
MARK = "@xdit "  # before every line of an agent, because shells print greetings on the same stream
UNASKED = 0  # number of a request whose answer nobody waits for
UNREADABLE = (
    "its answer is not understood; install the same version of xdit there, and see whether something prints between"
)

Deliver = Callable[[int, Mapping[str, Any]], None]
"""Takes the number of a host and a message of its agent."""


class Connection(Protocol):
    """A connection to one agent. It hands every message of the agent to a `Deliver`.

    Attributes:
        silence: seconds without a message after which the agent counts as gone.
    """

    silence: float

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a request. A broken connection raises nothing here, since its end is delivered as a message."""

    def close(self) -> None:
        """End the connection. The agent then ends its processes and itself."""


def status_message(status: RankStatus) -> dict[str, Any]:
    """The status of a rank as an agent sends it; `read_status` reads it."""
    beat = status.heartbeat
    return {
        "code": status.code,
        "heartbeat": [beat.count, beat.status.to_dict(), beat.written] if beat else None,
        "error": status.error,
        "log": status.log,
    }


def read_status(message: Mapping[str, Any], rank: int, host: str, clock_offset: float) -> RankStatus:
    """The status of a rank from the message of its agent.

    Args:
        host: the name of the agent's machine.
        clock_offset: seconds by which the clock of that machine is behind the clock of this one.

    Raises:
        TypeError, ValueError, KeyError, IndexError, AttributeError: it is no such message.
    """
    beat, error = message["heartbeat"], message["error"]
    if error:
        error = {**error, "host": host, "wall": error["wall"] + clock_offset, "rank": rank}
    heartbeat = Heartbeat(beat[0], 0.0, Status.from_dict(beat[1]), beat[2]) if beat else None
    return RankStatus(host, message["code"], heartbeat, error, log=f"{host}:{message['log']}")


def read_message(text: str) -> dict[str, Any] | None:
    """A message from a line of JSON, None if the line is something else."""
    try:
        message = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) else None
