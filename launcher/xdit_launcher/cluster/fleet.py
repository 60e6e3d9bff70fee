"""One run over agents on several machines, however they were started: check, start, watch, report, end."""

from __future__ import annotations

import base64
import contextlib
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from xdit_core.errors import UsageError, XditError
from xdit_core.filesystem import write_text
from xdit_core.outputs.results import RECORD
from xdit_core.planning import machine
from xdit_core.records import listed
from xdit_core.worker.heartbeat import Heartbeat
from xdit_core.worker.rendezvous import COLUMNS_VARIABLE
from xdit_launcher.cluster import host_facts, placement
from xdit_launcher.node import root_cause
from xdit_launcher.node.agent import ALIVE, SILENCE
from xdit_launcher.node.processes import log_path
from xdit_launcher.node.root_cause import RankStatus
from xdit_launcher.node.watching import (
    ASLEEP,
    CAUSE,
    INTERRUPTED,
    Suspension,
    say,
    signals_interrupt,
    stay_deaf,
    undisturbed,
    watch,
)

if TYPE_CHECKING:
    from xdit_core.plan import Plan

PATIENCE = 60.0  # seconds for an agent to start and answer
ODD = "its answer is not understood; install the same version of xdit there, and see whether something prints between"
UNASKED = 0  # number of a request whose answer nobody waits for
FAREWELL = 5.0  # seconds for an agent to end its processes

Deliver = Callable[[int, Mapping[str, Any]], None]


class Link(Protocol):
    """The way to one agent. What the agent says, and ``{"gone": why}`` when it ends, goes to the `Deliver` it was made
    with."""

    def send(self, message: Mapping[str, Any]) -> None:
        """Pass a request on; errors of a broken way are swallowed, since its end is delivered."""

    def close(self) -> None:
        """End the way; the agent then stops by itself."""


@dataclass(frozen=True)
class Host:
    """A machine of a run.

    Args:
        name: as the user calls it.
        slots: most ranks on it; None: as many as it has GPUs, or cores.
        devices: numbers of the GPUs to use; none: all.
        python: the interpreter there, "" for that of the launcher.
        sharing: how many of these are one machine.
    """

    name: str
    slots: int | None = None
    devices: tuple[int, ...] = ()
    python: str = ""
    sharing: int = 1


class Fleet:
    """Agents on several hosts.

    Args:
        hosts: the machines.
        connect: makes the link to host ``i``, given where to deliver what it says.
        typed: somebody typed the names, and may have given one machine two of them.
    """

    def __init__(self, hosts: Sequence[Host], connect: Callable[[int, Deliver], Link], typed: bool = False) -> None:
        self.hosts, self.typed = list(hosts), typed
        self.links: list[Link] = []
        self.inbox: queue.Queue[tuple[int, Mapping[str, Any]]] = queue.Queue()
        self.heard = dict.fromkeys(range(len(hosts)), time.monotonic())
        self.offset = dict.fromkeys(range(len(hosts)), 0.0)  # seconds that a host's clock is behind ours
        self.gone: dict[int, str] = {}
        self.seen: dict[int, RankStatus] = {}
        self.places: list[range] = []
        self._asked = 0
        self._over = threading.Event()
        self.suspension = Suspension(lambda: self._tell_all("pause"), self._resume)
        try:
            for i in range(len(hosts)):
                self.links.append(connect(i, lambda j, message: self.inbox.put((j, message))))
        except BaseException:
            self.close()
            raise
        threading.Thread(target=self._ping, daemon=True).start()

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _tell_all(self, do: str) -> None:
        """A request to all agents whose answer nobody waits for."""
        for link in self.links:
            link.send({"do": do, "id": UNASKED})

    def _resume(self) -> None:
        """After a stop, in which no host could be heard."""
        self._tell_all("resume")
        self.heard = dict.fromkeys(self.heard, time.monotonic())

    def _ping(self) -> None:
        while not self._over.wait(ALIVE):
            for link in self.links:
                link.send({"do": "ping"})

    def ask(
        self,
        do: str,
        each: Mapping[int, Mapping[str, Any]] | None = None,
        patience: float = PATIENCE,
        kind: type = object,
        **same: Any,
    ) -> tuple[dict[int, Any], list[str]]:
        """Ask agents and wait for their answers.

        Args:
            each: the hosts to ask, with arguments of their own; by default all.
            kind: what an answer must be.
            same: arguments for all of them.

        Returns:
            Answers by host, and a sentence for each host that had none.
        """
        each = {i: {} for i in range(len(self.hosts))} if each is None else each
        self._asked += 1
        number = self._asked  # an answer that comes too late is not taken for the next one
        for i, own in each.items():
            self.links[i].send({"do": do, "id": number, **same, **own})
        answers: dict[int, Any] = {}
        failed = {i: self.gone[i] for i in each if i in self.gone}
        end = time.monotonic() + patience
        while (open_ := set(each) - set(answers) - set(failed)) and time.monotonic() < end:
            before = time.monotonic()
            for i, message in self.news(0.2):
                if i in open_ and message.get("did") == number:
                    if "failed" in message:
                        failed[i] = str(message["failed"])
                    elif isinstance(message.get("result"), kind):
                        answers[i] = message["result"]
                    else:
                        failed[i] = ODD
                elif i in open_ and i in self.gone:
                    failed[i] = self.gone[i]
            if (took := time.monotonic() - before) > ASLEEP:
                end += took
        failed |= dict.fromkeys(
            set(each) - set(answers) - set(failed),
            f"no answer within {patience:g} s; see whether it is up and reachable",
        )
        return answers, [f"{self.hosts[i].name}: {failed[i]}" for i in sorted(failed)]

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
        """What came in, after waiting for the first for so long; keeps account of who is there. Here Ctrl-Z takes
        effect."""
        self.suspension.settle()
        with contextlib.suppress(queue.Empty):
            item = self.inbox.get(timeout=seconds)
            while True:
                i, message = item
                self.heard[i] = time.monotonic()
                if "gone" in message:
                    self.gone.setdefault(i, str(message["gone"]))
                try:
                    if "wall" in message:
                        self.offset[i] = time.time() - message["wall"]
                    if "screen" in message:
                        show(message["screen"], base64.b64decode(message["data"]))
                    self._note(i, message.get("seen", {}))
                except (TypeError, ValueError, KeyError, AttributeError, IndexError):
                    self.gone.setdefault(i, ODD)
                yield item
                item = self.inbox.get_nowait()

    def _note(self, i: int, news: Mapping[str, Any]) -> None:
        """What an agent tells of its ranks."""
        for key, now in news.items():
            error, name = now["error"], self.hosts[i].name
            if error:
                error = {**error, "host": name, "wall": error["wall"] + self.offset[i], "rank": int(key)}
            pulse = Heartbeat(now["pulse"][0], 0.0, now["pulse"][1], now["pulse"][2]) if now["pulse"] else None
            self.seen[int(key)] = RankStatus(name, now["code"], pulse, error, log=f"{name}:{now['log']}")

    def look(self) -> Mapping[int, RankStatus]:
        """What is known of all ranks; a host that says nothing counts as lost."""
        for _ in self.news(0.1):
            pass
        for i, ranks in enumerate(self.places):
            silent = time.monotonic() - self.heard[i]
            why = self.gone.get(i, "")
            if not why and silent > SILENCE:
                why = f"no word from it for {silent:.0f} s; see whether it is up, and its network"
            for rank in ranks:
                if why and self.seen[rank].code is None:
                    self.seen[rank] = replace(self.seen[rank], lost=why)
        return self.seen

    def start(
        self, plan: Plan, folder: Path, env: Mapping[str, str], rdzv: str | None, facts_: Mapping[int, Any]
    ) -> None:
        """Find an address at which all reach the first host, and start the ranks.

        Args:
            env: variables for the ranks of every host.
            rdzv: ``[HOST:]PORT`` at which to meet, None: any.
            facts_: what the hosts said of themselves.

        Raises:
            UsageError: the hosts are too few, differ, or do not reach each other.
        """
        room = [slots(h, facts_[i], plan.run.device) for i, h in enumerate(self.hosts)]
        self.places = placement.spread(plan.world, room, placement.together(plan))
        used = [i for i, ranks in enumerate(self.places) if ranks]
        machines: dict[str, list[int]] = {}
        for host, ranks in zip(self.hosts, self.places, strict=True):
            machines.setdefault(host.name, []).extend(ranks)
        for line in placement.warnings(plan, list(machines.values())):
            say(line)
        if idle := [h.name for i, h in enumerate(self.hosts) if i not in used]:
            say(
                f"{listed(idle)} {'has' if len(idle) == 1 else 'have'} nothing to do in a plan of {plan.world} "
                f"processes."
            )
        address, port = self.meet(used, rdzv, facts_)
        self.seen = {rank: RankStatus(self.hosts[i].name) for i in used for rank in self.places[i]}
        each = {
            i: {
                "ranks": [self.places[i].start, self.places[i].stop],
                "host": self.hosts[i].name,
                "devices": self.hosts[i].devices,
                "sharing": self.hosts[i].sharing,
            }
            for i in used
        }
        marks = [RECORD] if (folder / RECORD).exists() else []
        self.must(
            "go",
            each,
            plan=plan.to_json(),
            folder=str(folder),
            address=address,
            port=port,
            env={**env, **terminal()},
            marks=marks,
        )

    def meet(self, used: Sequence[int], rdzv: str | None, facts_: Mapping[int, Any]) -> tuple[str, int]:
        """Where the first host listens and all others reach it."""
        given, wanted = rendezvous(rdzv)
        first, name = used[0], self.hosts[used[0]].name
        port = int(self.must("serve", {first: {"port": wanted}}, kind=int)[first])
        if all(self.hosts[i].name == name for i in used):
            return given or "127.0.0.1", port
        choices = [given] if given else [name.rpartition("@")[2], facts_[first]["host"], *facts_[first]["addresses"]]
        found = self.must("reach", {i: {"addresses": choices, "port": port} for i in used}, kind=dict)
        for choice in choices:
            ways = [found[i].get(choice, "") for i in used]
            if all(
                way and not way.startswith("127.") for way in ways
            ):  # Debian gives a machine's own name the address 127.0.1.1
                return ways[0] if len(set(ways)) == 1 else choice, port
        worst = min(used, key=lambda i: len(found[i]))
        who = f"{self.hosts[worst].name} does not reach {name}" if worst != first else f"{name} does not answer"
        raise UsageError(
            f"{who} at port {port} of any of {', '.join(dict.fromkeys(choices))}; open the port in the firewall, or "
            f"name an address and a port "
            "that are open with --rdzv HOST:PORT."
        )

    def end(self) -> str:
        """End every process of the run.

        Returns:
            Words about it: a host that does not answer ends its processes by itself, which nobody sees from here.
        """
        with undisturbed():
            alive: dict[int, dict[str, Any]] = {
                i: {}
                for i in range(len(self.links))
                if i not in self.gone and time.monotonic() - self.heard[i] < SILENCE
            }
            answers, _ = self.ask("stop", alive, patience=FAREWELL)
        silent = [host.name for i, host in enumerate(self.hosts) if i not in answers]
        if not silent:
            return "every process has ended"
        return f"{listed(silent)} did not answer, where processes end by themselves within {SILENCE:.0f} s"

    def close(self) -> None:
        """Let go of all hosts; agents that still run stop by themselves."""
        self._over.set()
        with undisturbed():
            for link in self.links:
                link.close()


def rendezvous(rdzv: str | None) -> tuple[str, int]:
    """``[HOST:]PORT`` as host and port, "" and 0 for any.

    Raises:
        UsageError: it is something else.
    """
    host, _, port = (rdzv or "").rpartition(":")
    if rdzv and not (port.isdecimal() and len(port) < 6 and 0 < int(port) < 65536):
        raise UsageError(f"--rdzv {rdzv} is not PORT or HOST:PORT; write for example 29500.")
    return host.strip("[]"), int(port or 0)


def slots(host: Host, about: Mapping[str, Any], device: str | None) -> int:
    """Most ranks on a host."""
    gpus = 0 if device == "cpu" else len(about["gpus"])
    return host.slots or len(host.devices) or gpus or int(about["cores"])


def terminal() -> dict[str, str]:
    """Tells rank 0, which sees a pipe, that its progress is shown on a terminal; empty if it is not."""
    try:
        return {COLUMNS_VARIABLE: str(os.get_terminal_size(sys.stderr.fileno()).columns or 80)}
    except (OSError, ValueError):  # ValueError: there is no such stream
        return {}


def show(screen: int, data: bytes) -> None:
    """What rank 0 prints, on this terminal."""
    stream = sys.stdout if screen == 1 else sys.stderr
    with contextlib.suppress(OSError, ValueError):
        if screen == 1 and sys.stderr.isatty():  # what takes the bar away may be on its way yet
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
        stream.flush()
        if hasattr(stream, "buffer"):  # as it came: it may be cut in the middle of a character
            stream.buffer.write(data)
        else:
            stream.write(data.decode("utf-8", "replace"))
        stream.flush()


def chosen(patterns: Sequence[str]) -> dict[str, str]:
    """Variables of this environment by name, ``NCCL_*`` for all that begin so.

    Raises:
        UsageError: one that is named is not set here.
    """
    for name in patterns:
        if "*" not in name and name not in os.environ:
            raise UsageError(
                f"the variable {name} is to be passed on but is not set here; set it, or leave it out of env=."
            )
    return {k: v for k, v in os.environ.items() if any(fnmatch(k, p) for p in patterns)}


def check(fleet: Fleet, plan: Plan | None) -> tuple[dict[int, Any], list[str]]:
    """The quick half of ``doctor``: what the hosts are, and sentences about what cannot work, with a plan also for
    it."""
    distributions, modules = host_facts.origins(plan)
    model, device = (plan.folder, plan.run.device) if plan else ("", None)
    ours = host_facts.about(distributions, modules, model)
    found, problems = fleet.ask(
        "hello",
        kind=dict,
        distributions=distributions,
        modules=modules,
        plan=plan.to_json() if plan else "",
        folder=os.getcwd(),
    )
    odd = [i for i, theirs in found.items() if not host_facts.alike(theirs, ours)]
    problems += [f"{fleet.hosts[i].name}: {ODD}" for i in odd]
    found = {i: theirs for i, theirs in found.items() if i not in odd}
    names = {i: fleet.hosts[i].name for i in found}
    problems += host_facts.same_machine(found, names) if fleet.typed else ()
    for i, theirs in sorted(found.items()):
        host, gpus = fleet.hosts[i], len(theirs["gpus"])
        problems += host_facts.differences(theirs, ours, host.name)
        problems.append(host_facts.model_problem(theirs, ours, host.name, model))
        problems.append(host_facts.device_problem(plan, bool(gpus), f"{host.name} has {gpus}") if plan else "")
        if device == "cuda" and not gpus:
            problems.append(f"{host.name} has no GPU that its driver shows; leave it out, or use device=cpu.")
        elif gpus and device != "cpu" and (host.slots or 0) > gpus:
            problems.append(f"{host.name} has {gpus} GPUs and {host.slots} slots; lower its slots.")
    return found, [line for line in problems if line]


def run(plan: Plan, folder: Path, fleet: Fleet, env: Sequence[str] = (), rdzv: str | None = None) -> int:
    """A run over a fleet.

    Args:
        folder: the run folder here; the hosts make one of the same name.
        env: names of variables to pass on.
        rdzv: ``[HOST:]PORT`` at which the ranks meet.

    Returns:
        0, the exit code of the rank to blame, or 130 after Ctrl-C and SIGTERM.

    Raises:
        UsageError: something would not work; says what, before any rank starts.
    """
    passed = chosen(env)
    write_text(folder / "plan.json", plan.to_json(), "runs")
    try:
        with signals_interrupt(), fleet.suspension.installed():
            found, problems = check(fleet, plan)
            if problems:
                raise UsageError(*problems)
            fleet.start(plan, folder, passed, rdzv, found)
            cause = CAUSE if len(fleet.hosts) == 1 else SILENCE + CAUSE  # so long a silent host may go unnoticed
            blamed = watch(fleet.look, plan.run.timeout, cause, lambda: stacks(fleet))
    except KeyboardInterrupt:
        stay_deaf()
        say("\n".join([f"interrupted; {fleet.end()}.", *root_cause.progress(fleet.seen, plan)]))
        return INTERRUPTED
    except XditError:
        fleet.end()
        raise
    shared = blamed is None or log_path(folder, blamed.rank).exists()
    if blamed is not None:
        blamed = replace(blamed, log=bring(fleet, blamed.rank, folder) or blamed.log)
    fleet.end()
    for _ in fleet.news(0.0):  # the last words of rank 0
        pass
    if blamed is None:
        return 0
    say("\n".join([*root_cause.lines(blamed, plan.world, together=shared), *root_cause.progress(fleet.seen, plan)]))
    return blamed.code


def stacks(fleet: Fleet) -> None:
    """Every rank writes into its log where it is."""
    fleet.ask("stacks", patience=3.0)


def bring(fleet: Fleet, rank: int, folder: Path) -> str:
    """Copy the end of a log here, unless the disk is shared; says where it is now."""
    path = log_path(folder, rank)
    if path.exists():
        return str(path)
    host = next(i for i, ranks in enumerate(fleet.places) if rank in ranks)
    answers, _ = fleet.ask("bring", {host: {"rank": rank}}, patience=3.0, kind=str)
    if not answers.get(host):
        return ""
    try:
        path.write_text(answers[host], encoding="utf-8")
    except OSError:  # the report must come all the same
        return ""
    return str(path)


def devices(hosts: Sequence[Host]) -> int:
    """Processes that suit the hosts; of one whose slots are not given, as many as suit this machine."""
    return sum(h.slots or len(h.devices) or machine.cuda_devices() or machine.cores() for h in hosts)
