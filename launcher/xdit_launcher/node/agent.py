"""One machine's part of a run: ``python -m xdit_launcher.node.agent``.

It takes requests as lines of JSON on stdin and answers on stdout; the end of stdin means stop, so nothing outlives
whoever started it, and so does silence: the launcher says something every two seconds.
"""

from __future__ import annotations

import base64
import json
import os
import selectors
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xdit_core.errors import XditError
from xdit_core.filesystem import atomically, make_folder
from xdit_core.outputs.results import check_writable
from xdit_launcher.cluster import bandwidth, host_facts
from xdit_launcher.cluster.protocol import ALIVE, MARK, SILENCE, status_message
from xdit_launcher.node import processes, sockets
from xdit_launcher.node.processes import Here, Share, Workers
from xdit_launcher.node.watching import signals_interrupt
from xdit_launcher.run_folders import remove_old

if TYPE_CHECKING:
    from xdit_core.plan import Plan

Send = Callable[[Mapping[str, Any]], None]


class Agent:
    """What a machine does for a run; each method that takes a request returns the answer as JSON.

    Args:
        send: takes answers and news to the launcher.
    """

    def __init__(self, send: Send) -> None:
        self.send, self.workers, self.done, self.paused = send, Workers(), False, False
        self._server: socket.socket | None = None
        self._screens: dict[int, int] = {}  # file descriptor of a pipe from rank 0 to 1 or 2
        self._here: Here | None = None
        self._told: dict[int, Any] = {}
        self._spoke = 0.0

    def handle(self, request: Mapping[str, Any]) -> None:
        """Do what is asked and answer."""
        name = request["do"]
        arguments = {k: v for k, v in request.items() if k not in ("do", "id")}
        if name == "ping":
            return
        try:
            answer: dict[str, Any] = {"result": getattr(self, f"do_{name}")(**arguments)}
        except XditError as error:
            answer = {"failed": str(error)}
        except Exception as error:
            answer = {"failed": f"{type(error).__name__}: {error}"}
        self.send({"did": request["id"], **answer})

    def do_hello(self, distributions: Sequence[str], modules: Sequence[str], plan: str, folder: str) -> dict[str, Any]:
        """Facts about this machine; and work in the same folder as the launcher, if there is one."""
        with suppress(OSError):
            os.chdir(folder)
        model = ""
        with suppress(
            Exception
        ):  # another version may not read the plan; that the versions differ is what must be said
            model = located(plan).folder if plan else ""
        return host_facts.about(distributions, modules, model)

    def do_serve(self, port: int) -> int:
        """Listen for the other ranks; 0: on any free port, which is the answer."""
        self._server = sockets.listen("", port, backlog=1024)
        return int(self._server.getsockname()[1])

    def do_reach(self, addresses: Sequence[str], port: int) -> dict[str, str]:
        """Which names and addresses of another machine answer, with the address that it was; names may lead elsewhere
        on each machine."""
        return bandwidth.answering(addresses, port)

    def do_go(
        self,
        plan: str,
        folder: str,
        ranks: Sequence[int],
        address: str,
        port: int,
        host: str,
        env: Mapping[str, str],
        devices: Sequence[int],
        sharing: int,
    ) -> str:
        """Start the ranks of this machine; the answer is the run folder."""
        found, place = located(plan), Path(folder)
        make_folder(place, "runs", folder)
        remove_old(place.parent, found.run.keep_runs)
        with atomically(place / "plan.json") as temporary:
            temporary.write_text(found.to_json(), encoding="utf-8")
        if any(found.owns(rank) for rank in range(*ranks)):
            check_writable(found)
        share = Share(
            place, range(*ranks), found.world, address, port, found.run.threads, host, env, tuple(devices), sharing
        )
        share.check(found.device)
        screen: list[int] = []
        if 0 in share.ranks:
            for number in (1, 2):
                read, write = os.pipe()
                os.set_blocking(read, False)
                self._screens[read] = number
                screen.append(write)
        try:
            processes.spawn(share, self.workers, self._server, screen)
        finally:
            for fd in screen:
                os.close(fd)
            if self._server:
                self._server.close()
        self._here = Here(place, self.workers, host)
        return str(place)

    def do_stacks(self) -> None:
        """Every rank writes into its log where it is."""
        processes.ask_for_stacks(self.workers)

    def do_bring(self, rank: int) -> str:
        """The end of the log of a rank."""
        if self._here is None:
            return ""
        with suppress(OSError):
            return processes.log_path(self._here.folder, rank).read_text(encoding="utf-8", errors="replace")[-65536:]
        return ""

    def do_resolve(self, names: Sequence[str]) -> dict[str, str]:
        """Addresses of host names, as this machine knows them."""
        return host_facts.resolved(names)

    def do_import(self, seconds: float) -> dict[str, Any]:
        """Whether torch works here."""
        return host_facts.imported(seconds)

    def do_clock(self) -> float:
        """The time of day here, in seconds."""
        return time.time()

    def do_echo(self, seconds: float) -> int:
        """Let others measure the way to this machine for a while; the answer is a port."""
        return bandwidth.serve(seconds)

    def do_measure(self, addresses: Sequence[str], port: int, seconds: float) -> dict[str, Any]:
        """Latency and bandwidth to a machine that does `do_echo`."""
        return bandwidth.measure(addresses, port, seconds)

    def do_pause(self) -> None:
        """Stop the ranks until `do_resume`; the launcher is stopped too, so that its silence means nothing."""
        self.paused = True
        processes.pause(self.workers)

    def do_resume(self) -> None:
        """Go on."""
        self.paused = False
        processes.resume(self.workers)

    def do_stop(self) -> None:
        """End everything."""
        processes.stop(self.workers)
        self.turn()
        self.done = True

    def turn(self) -> None:
        """Tell what is new, or at least that there is still somebody here; nothing while nobody listens."""
        if self.paused:
            return
        for fd in list(self._screens):
            self._show(fd)
        news = {}
        for rank, status in self._here.look().items() if self._here else ():
            message = status_message(status)
            if self._told.get(rank) != message:
                news[rank] = self._told[rank] = message
        if news or time.monotonic() - self._spoke > ALIVE:
            self._spoke = time.monotonic()
            self.send({"seen": news, "wall": time.time()})

    def _show(self, fd: int) -> None:
        """Pass on what rank 0 prints."""
        with suppress(BlockingIOError):
            while data := os.read(fd, 65536):
                self.send({"screen": self._screens[fd], "data": base64.b64encode(data).decode()})
            os.close(fd)
            del self._screens[fd]


def located(text: str) -> Plan:
    """A plan with the folder that its model has here: the same as at the launcher, or where this machine keeps it."""
    from xdit_core.checkpoints import hub
    from xdit_core.plan import Plan
    from xdit_core.planning.settings import ModelSettings, build
    from xdit_core.registry.registry import Registry

    plan = Plan.from_json(text)
    if Path(plan.folder).is_dir():
        return plan
    try:
        folder = hub.locate(Registry().model(plan.model)[0], build(ModelSettings, "model.", plan.values), fetch=False)
    except XditError:  # the launcher will say that the folder is missing
        return plan
    return replace(plan, folder=str(folder))


def main() -> None:
    """Serve until the end of stdin, an end of the work, or silence."""
    out = os.dup(1)
    os.dup2(2, 1)  # whatever prints must not come between the answers

    def send(message: Mapping[str, Any]) -> None:
        data = memoryview(f"{MARK}{json.dumps(message)}\n".encode())
        while data:
            data = data[os.write(out, data) :]

    agent = Agent(send)
    try:
        with signals_interrupt():
            serve(agent)
    except (KeyboardInterrupt, BrokenPipeError):
        pass
    finally:
        processes.stop(agent.workers)


def serve(agent: Agent) -> None:
    """Requests from stdin, news in between."""
    os.set_blocking(0, False)
    buffer, heard = b"", time.monotonic()
    with selectors.DefaultSelector() as selector:
        selector.register(0, selectors.EVENT_READ)
        while not agent.done and (agent.paused or time.monotonic() - heard < SILENCE):
            if selector.select(0.1):
                data = os.read(0, 65536)
                if not data:
                    return
                heard = time.monotonic()
                *lines, buffer = (buffer + data).split(b"\n")
                for request in map(json.loads, lines):
                    agent.handle(request)
                    heard = time.monotonic()  # it was busy, not left alone
            agent.turn()


if __name__ == "__main__":
    main()
