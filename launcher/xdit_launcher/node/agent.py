"""The agent, which runs one machine's share of a run: ``python -m xdit_launcher.node.agent``.

It takes requests as lines of JSON on stdin and answers on stdout, see `xdit_launcher.cluster.protocol`. It ends
itself and all ranks when stdin ends or the launcher says nothing for long, so that nothing outlives the launcher.
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
from xdit_launcher.node.processes import Controls, LocalRanks, NodeShare, Workers
from xdit_launcher.node.signals import signals_interrupt
from xdit_launcher.run_folders import remove_old

if TYPE_CHECKING:
    from xdit_core.plan import Plan

Send = Callable[[Mapping[str, Any]], None]


class Agent:
    """What a machine does for a run. Each method ``do_NAME`` takes a request and returns the answer as JSON.

    Args:
        send: sends a message to the launcher.
    """

    def __init__(self, send: Send) -> None:
        self.send, self.workers, self.ended, self.paused = send, Workers(), False, False
        self._server: socket.socket | None = None
        self._screens: dict[int, int] = {}  # file descriptor of a pipe from rank 0 to 1 or 2
        self._local_ranks: LocalRanks | None = None
        self.controls: Controls = {}  # of ranks that answer requests
        self._sent: dict[int, Any] = {}  # the last message about each rank
        self._last_message = 0.0

    def handle(self, request: Mapping[str, Any]) -> None:
        """Do what a request asks for, and answer it."""
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
        """Work in the same folder as the launcher if there is one, and answer with the facts about this machine."""
        with suppress(OSError):
            os.chdir(folder)
        model = ""
        with suppress(Exception):  # another version may not read the plan; that the versions differ is reported then
            model = locate_model(plan).folder if plan else ""
        return host_facts.about(distributions, modules, model)

    def do_serve(self, port: int) -> int:
        """Listen for the other ranks on a port, 0 for any free one, and answer with the port."""
        self._server = sockets.listen("", port, backlog=1024)
        return int(self._server.getsockname()[1])

    def do_reach(self, addresses: Sequence[str], port: int) -> dict[str, str]:
        """Try names and addresses of another machine.

        Returns:
            Those that answer, each with the address to which it led, since names may lead elsewhere on each machine.
        """
        return bandwidth.answering(addresses, port)

    def do_start(
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
        serving: bool = False,
    ) -> str:
        """Start the ranks of this machine, and answer with the run folder."""
        local_plan, run_folder = locate_model(plan), Path(folder)
        make_folder(run_folder, "runs", folder)
        remove_old(run_folder.parent, local_plan.run.keep_runs)
        with atomically(run_folder / "plan.json") as temporary:
            temporary.write_text(local_plan.to_json(), encoding="utf-8")
        if any(local_plan.owns(rank) for rank in range(*ranks)):
            check_writable(local_plan)
        share = NodeShare(
            folder=run_folder,
            ranks=range(*ranks),
            world=local_plan.world,
            address=address,
            port=port,
            threads=local_plan.run.threads,
            host=host,
            env=env,
            devices=tuple(devices),
            sharing=sharing,
        )
        share.check(local_plan.device)
        screen: list[int] = []
        if 0 in share.ranks:
            for number in (1, 2):
                read, write = os.pipe()
                os.set_blocking(read, False)
                self._screens[read] = number
                screen.append(write)
        try:
            processes.spawn(share, self.workers, self._server, screen, self.controls if serving else None)
        finally:
            for fd in screen:
                os.close(fd)
            if self._server:
                self._server.close()
        self._local_ranks = LocalRanks(run_folder, self.workers, host, self.controls)
        return str(run_folder)

    def do_send(self, message: Mapping[str, Any]) -> None:
        """Pass a message on to every rank of this machine."""
        for control in self.controls.values():
            control.send(message)

    def do_stacks(self) -> None:
        """Let every rank write the stacks of its threads into its log."""
        processes.ask_for_stacks(self.workers, self._local_ranks.folder if self._local_ranks else None)

    def do_read_log(self, rank: int) -> str:
        """Answer with the end of the log of a rank."""
        if self._local_ranks is None:
            return ""
        with suppress(OSError):
            return processes.log_path(self._local_ranks.folder, rank).read_text(encoding="utf-8", errors="replace")[
                -65536:
            ]
        return ""

    def do_resolve(self, names: Sequence[str]) -> dict[str, str]:
        """Answer with the addresses of host names, as this machine resolves them."""
        return host_facts.resolved(names)

    def do_import(self, seconds: float) -> dict[str, Any]:
        """Import torch, and answer with what it sees."""
        return host_facts.imported(seconds)

    def do_clock(self) -> float:
        """Answer with the time of day on this machine, in seconds."""
        return time.time()

    def do_echo(self, seconds: float) -> int:
        """Let other machines measure their connection to this one for a while, and answer with the port."""
        return bandwidth.serve(seconds)

    def do_measure(self, addresses: Sequence[str], port: int, seconds: float) -> dict[str, Any]:
        """Measure latency and bandwidth to a machine that does `do_echo`."""
        return bandwidth.measure(addresses, port, seconds)

    def do_pause(self) -> None:
        """Stop the ranks until `do_resume`. The launcher is stopped too, so its silence means nothing until then."""
        self.paused = True
        processes.pause(self.workers)

    def do_resume(self) -> None:
        """Let the ranks go on."""
        self.paused = False
        processes.resume(self.workers)

    def do_stop(self) -> None:
        """End all ranks and this agent."""
        processes.stop(self.workers)
        self.send_news()
        self.ended = True

    def send_news(self) -> None:
        """Send what is new of the ranks, or a sign of life if nothing is; nothing while the run is paused."""
        if self.paused:
            return
        for fd in list(self._screens):
            self._show(fd)
        for rank, message in self._local_ranks.messages(0.0) if self._local_ranks and self.controls else ():
            self.send({"rank": rank, "message": message})
        news = {}
        for rank, status in self._local_ranks.look().items() if self._local_ranks else ():
            message = status_message(status)
            if self._sent.get(rank) != message:
                news[rank] = self._sent[rank] = message
        if news or time.monotonic() - self._last_message > ALIVE:
            self._last_message = time.monotonic()
            self.send({"seen": news, "wall": time.time()})

    def _show(self, fd: int) -> None:
        """Send what rank 0 has printed.

        Args:
            fd: of the pipe from rank 0.
        """
        with suppress(BlockingIOError):
            while data := os.read(fd, 65536):
                self.send({"screen": self._screens[fd], "data": base64.b64encode(data).decode()})
            os.close(fd)
            del self._screens[fd]


def locate_model(text: str) -> Plan:
    """Read a plan and set the folder that its model has on this machine.

    It is the folder of the launcher if it exists here, or else the one where this machine keeps the model.
    """
    from xdit_core.checkpoints import hub
    from xdit_core.plan import Plan
    from xdit_core.registry.registry import Registry
    from xdit_core.settings import ModelSettings, build

    plan = Plan.from_json(text)
    if Path(plan.folder).is_dir():
        return plan
    try:
        folder = hub.locate(Registry().model(plan.model)[0], build(ModelSettings, "model.", plan.values), fetch=False)
    except XditError:  # the launcher will say that the folder is missing
        return plan
    return replace(plan, folder=str(folder))


def main() -> None:
    """Serve until stdin ends, the work is done, or the launcher is silent for too long."""
    out = os.dup(1)
    os.dup2(2, 1)  # so that nothing else is printed between the answers

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
    """Handle the requests that come on stdin, and send news in between."""
    os.set_blocking(0, False)
    buffer, heard = b"", time.monotonic()
    with selectors.DefaultSelector() as selector:
        selector.register(0, selectors.EVENT_READ)
        while not agent.ended and (agent.paused or time.monotonic() - heard < SILENCE):
            if 0 in waited_for(selector, agent.controls):
                data = os.read(0, 65536)
                if not data:
                    return
                heard = time.monotonic()
                *lines, buffer = (buffer + data).split(b"\n")
                for request in map(json.loads, lines):
                    agent.handle(request)
                    heard = time.monotonic()  # this agent was busy meanwhile, and not left alone
            agent.send_news()


def waited_for(selector: selectors.BaseSelector, controls: Controls) -> set[int]:
    """Wait for a moment until something can be read.

    Args:
        controls: of ranks; they are added to the selector, and taken from it when a rank has gone.

    Returns:
        File descriptors that can be read.
    """
    registered = selector.get_map()
    for control in controls.values():
        if control.closed and control in registered:
            selector.unregister(control)
        elif not control.closed and control not in registered:
            selector.register(control, selectors.EVENT_READ)
    return {key.fd for key, _ in selector.select(0.1)}


if __name__ == "__main__":
    main()
