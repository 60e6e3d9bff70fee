"""Agents on several machines: ask them, hear what they tell of their ranks, end them."""

from __future__ import annotations

import base64
import contextlib
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from xdit_core.errors import UsageError
from xdit_core.records import join_words
from xdit_launcher.cluster.hosts import Host
from xdit_launcher.cluster.protocol import (
    ALIVE,
    FAREWELL,
    PATIENCE,
    SILENCE,
    UNASKED,
    UNREADABLE,
    Connection,
    Deliver,
    read_status,
)
from xdit_launcher.node.root_cause import RankStatus
from xdit_launcher.node.signals import Suspension, without_interrupts
from xdit_launcher.node.watching import ASLEEP

NOBODY = -1  # in place of a host: an item of the inbox that only wakes whoever waits for it


class Fleet:
    """Agents on several hosts.

    Args:
        hosts: the machines.
        connect: makes the connection to host ``i``, given where to deliver the messages of its agent.
        typed: a person typed the names of the hosts, and may have given one machine two names.

    Attributes:
        statuses: what is known of each rank, by rank.
        ranks_of: the ranks of each host.
    """

    def __init__(
        self, hosts: Sequence[Host], connect: Callable[[int, Deliver], Connection], typed: bool = False
    ) -> None:
        self.hosts, self.typed = list(hosts), typed
        self.connections: list[Connection] = []
        self.statuses: dict[int, RankStatus] = {}
        self.ranks_of: list[range] = []
        self.gone: dict[int, str] = {}  # hosts whose connection has ended, with the reason
        self.heard = dict.fromkeys(range(len(hosts)), time.monotonic())  # when each host last said something
        self._clock_offset = dict.fromkeys(range(len(hosts)), 0.0)  # seconds that a host's clock is behind ours
        self._rank_messages: list[tuple[int, dict[str, Any]]] = []
        self._inbox: queue.Queue[tuple[int, Mapping[str, Any]]] = queue.Queue()
        self._last_request = 0
        self._closed = threading.Event()
        self.suspension = Suspension(lambda: self._tell_all("pause"), self._resume)
        try:
            for i in range(len(hosts)):
                self.connections.append(connect(i, lambda j, message: self._inbox.put((j, message))))
        except BaseException:
            self.close()
            raise
        threading.Thread(target=self._ping, daemon=True).start()

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _tell_all(self, do: str) -> None:
        """Send all agents a request whose answer nobody waits for."""
        for connection in self.connections:
            connection.send({"do": do, "id": UNASKED})

    def _resume(self) -> None:
        """Let all ranks go on after a stop, in which no host could be heard."""
        self._tell_all("resume")
        self.heard = dict.fromkeys(self.heard, time.monotonic())

    def _ping(self) -> None:
        while not self._closed.wait(ALIVE):
            for connection in self.connections:
                connection.send({"do": "ping"})

    def ask(
        self,
        do: str,
        each: Mapping[int, Mapping[str, Any]] | None = None,
        patience: float = PATIENCE,
        kind: type = object,
        **same: Any,
    ) -> tuple[dict[int, Any], list[str]]:
        """Send a request to agents and wait for their answers.

        Args:
            do: name of the request.
            each: the hosts to ask, each with arguments of its own; by default all hosts without any.
            patience: seconds to wait.
            kind: the type that an answer must have.
            same: arguments that are the same for all hosts.

        Returns:
            The answers by host, and a sentence for each host that gave none.
        """
        each = {i: {} for i in range(len(self.hosts))} if each is None else each
        self._last_request += 1
        number = self._last_request  # so that an answer that comes too late is not taken for the next one
        for i, arguments in each.items():
            self.connections[i].send({"do": do, "id": number, **same, **arguments})
        answers: dict[int, Any] = {}
        failures = {i: self.gone[i] for i in each if i in self.gone}
        end = time.monotonic() + patience
        while (awaited := set(each) - set(answers) - set(failures)) and time.monotonic() < end:
            before = time.monotonic()
            for i, message in self.news(0.2):
                if i in awaited and message.get("did") == number:
                    if "failed" in message:
                        failures[i] = str(message["failed"])
                    elif isinstance(message.get("result"), kind):
                        answers[i] = message["result"]
                    else:
                        failures[i] = UNREADABLE
                elif i in awaited and i in self.gone:
                    failures[i] = self.gone[i]
            if (took := time.monotonic() - before) > ASLEEP:
                end += took
        failures |= dict.fromkeys(
            set(each) - set(answers) - set(failures),
            f"no answer within {patience:g} s; see whether it is up and reachable",
        )
        return answers, [f"{self.hosts[i].name}: {failures[i]}" for i in sorted(failures)]

    def must(self, do: str, each: Mapping[int, Mapping[str, Any]] | None = None, **same: Any) -> dict[int, Any]:
        """`ask`, where every host must answer.

        Raises:
            UsageError: all that went wrong, a line for each host.
        """
        answers, problems = self.ask(do, each, **same)
        if problems:
            raise UsageError(*problems)
        return answers

    def news(self, seconds: float) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """Wait for a message for so many seconds, note what all that came say of the ranks, and yield them.

        A Ctrl-Z of the user takes effect here.
        """
        self.suspension.settle()
        with contextlib.suppress(queue.Empty):
            item = self._inbox.get(timeout=seconds)
            while True:
                i, message = item
                if i == NOBODY:
                    item = self._inbox.get_nowait()
                    continue
                self.heard[i] = time.monotonic()
                if "gone" in message:
                    self.gone.setdefault(i, str(message["gone"]))
                try:
                    self._note(i, message)
                except (TypeError, ValueError, KeyError, AttributeError, IndexError):
                    self.gone.setdefault(i, UNREADABLE)
                yield item
                item = self._inbox.get_nowait()

    def _note(self, i: int, message: Mapping[str, Any]) -> None:
        """Keep what an agent tells by itself, and print what its rank 0 prints."""
        if "wall" in message:
            self._clock_offset[i] = time.time() - message["wall"]
        if "screen" in message:
            print_from(message["screen"], base64.b64decode(message["data"]))
        if "rank" in message:
            self._rank_messages.append((int(message["rank"]), dict(message["message"])))
        for key, status in message.get("seen", {}).items():
            self.statuses[int(key)] = read_status(status, int(key), self.hosts[i].name, self._clock_offset[i])

    def send_to_ranks(self, message: Mapping[str, Any]) -> None:
        """Send a message to every rank; their agents pass it on."""
        for i, ranks in enumerate(self.ranks_of):
            if ranks:
                self.connections[i].send({"do": "send", "id": UNASKED, "message": message})

    def wake(self) -> None:
        """Let `news` return at once; may be called from any thread."""
        self._inbox.put((NOBODY, {}))

    def rank_messages(self, seconds: float) -> list[tuple[int, dict[str, Any]]]:
        """Messages of ranks, each with the rank; wait so many seconds if there is none."""
        for _ in self.news(0.0 if self._rank_messages else seconds):
            pass
        messages, self._rank_messages = self._rank_messages, []
        return messages

    def look(self) -> Mapping[int, RankStatus]:
        """What is known of all ranks, once messages have been waited for for a moment."""
        for _ in self.news(0.1):
            pass
        return self.statuses_now()

    def statuses_now(self) -> Mapping[int, RankStatus]:
        """What is known of all ranks now; those of a host that says nothing for long count as lost."""
        for i, ranks in enumerate(self.ranks_of):
            silent = time.monotonic() - self.heard[i]
            why = self.gone.get(i, "")
            if not why and silent > self.connections[i].silence:
                why = f"no word from it for {silent:.0f} s; see whether it is up, and its network"
            for rank in ranks:
                if why and self.statuses[rank].code is None:
                    self.statuses[rank] = replace(self.statuses[rank], lost=why)
        return self.statuses

    def end(self) -> str:
        """End every process of the run.

        Returns:
            What became of them. A host that does not answer ends its processes by itself, which nobody sees from here.
        """
        with without_interrupts():
            alive: dict[int, dict[str, Any]] = {
                i: {}
                for i in range(len(self.connections))
                if i not in self.gone and time.monotonic() - self.heard[i] < self.connections[i].silence
            }
            answers, _ = self.ask("stop", alive, patience=FAREWELL)
        silent = [host.name for i, host in enumerate(self.hosts) if i not in answers]
        if not silent:
            return "every process has ended"
        return f"{join_words(silent)} did not answer, where processes end by themselves within {SILENCE:.0f} s"

    def close(self) -> None:
        """Close all connections; agents that still run end by themselves."""
        self._closed.set()
        with without_interrupts():
            for connection in self.connections:
                connection.close()


def print_from(screen: int, data: bytes) -> None:
    """Print on this terminal what rank 0 prints.

    Args:
        screen: 1 for stdout, 2 for stderr.
    """
    stream = sys.stdout if screen == 1 else sys.stderr
    with contextlib.suppress(OSError, ValueError):
        if screen == 1 and sys.stderr.isatty():  # what takes the progress bar away may still be on its way
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
        stream.flush()
        if hasattr(stream, "buffer"):  # as it came: it may be cut in the middle of a character
            stream.buffer.write(data)
        else:
            stream.write(data.decode("utf-8", "replace"))
        stream.flush()
