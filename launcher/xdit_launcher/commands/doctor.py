"""``xdit-launch doctor``: look at all machines before a run, and name a fix for each problem."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from xdit_launcher.backends.base import Backend
from xdit_launcher.cluster.checks import check_hosts
from xdit_launcher.cluster.fleet import Fleet
from xdit_launcher.cluster.rendezvous import parse_rendezvous
from xdit_launcher.printing import print_lines

if TYPE_CHECKING:
    from xdit_core.plan import Plan

SECONDS = 0.5  # for which a pair of machines sends data
SKEW = 1.0  # seconds by which clocks may differ before a note
IMPORT = 120.0  # seconds for torch to be imported on a machine with slow disks
LITTLE_DISK = 2 << 30  # bytes; with less than that, results may not fit


def doctor(on: Backend, plan: Plan | None, as_json: bool = False) -> int:
    """Look at all machines of a backend, and print what is wrong.

    Args:
        on: the backend that would start the run.
        plan: of the run, None to look at the machines only.
        as_json: as one JSON object with ``machines``, ``network``, ``notes`` and ``problems``.

    Returns:
        1 if something must be repaired, else 0.

    Raises:
        UsageError: the hosts cannot be read.
    """
    with on.connect() as fleet:
        facts, problems = check_hosts(fleet, plan)
        names = {i: fleet.hosts[i].name for i in facts}
        if not as_json:
            print_lines(machines(facts, names))
        notes: list[str] = []
        lines: list[str] = []
        problems += imports(fleet, facts, names)
        problems += ports(fleet, facts, getattr(on.settings, "rdzv", ""))
        notes += clocks(fleet, names)
        notes += disks(facts, names)
        if len(facts) > 1:
            notes += resolving(fleet, facts, names)
            lines, unreachable = network(fleet, facts, names)
            problems += unreachable
            if not as_json:
                print_lines(lines)
    if as_json:
        about = {"machines": {names[i]: about for i, about in facts.items()}, "network": lines}
        click.echo(json.dumps({**about, "notes": notes, "problems": problems}, indent=1, default=str))
        return 1 if problems else 0
    for note in notes:
        print_lines([f"note: {note}"])
    for problem in problems:
        print_lines([f"problem: {problem}"])
    if not problems:
        click.echo("all is well." if not notes else "no problem that would stop a run.")
    return 1 if problems else 0


def machines(facts: Mapping[int, Any], names: Mapping[int, str]) -> Iterator[str]:
    """A table of what the machines have and run."""
    rows = []
    for i, about in sorted(facts.items()):
        gpus = about["gpus"]
        described = [gpu for gpu in gpus if gpu]
        memory = (
            f", {min(g['free'] for g in described) / 2**30:.0f} of {described[0]['total'] / 2**30:.0f} GiB free"
            if described
            else ""
        )
        devices = f"{len(gpus)} x {described[0]['name'] if described else 'GPU'}{memory}" if gpus else "no GPU"
        cores = f"{about['cores']} cores, {about['free memory'] / 2**30:.0f} GiB free"
        rows.append([names[i], about["python"], *(v or "-" for v in about["versions"].values()), devices, cores])
    if rows:
        packages = next(iter(facts.values()))["versions"]
        yield from table(["host", "python", *packages, "devices", "cpu"], rows)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """The lines of a table, its columns as wide as they need."""
    wide = [max(len(line[i]) for line in (head, *rows)) for i in range(len(head))]
    for line in (head, *rows):
        yield "  ".join(f"{cell:<{w}}" for cell, w in zip(line, wide, strict=True)).rstrip()


def imports(fleet: Fleet, facts: Mapping[int, Any], names: Mapping[int, str]) -> list[str]:
    """Problems of machines on which torch cannot be imported, or does not see the GPUs that the driver shows."""
    answers, problems = fleet.ask("import", {i: {} for i in facts}, patience=IMPORT + 5, seconds=IMPORT)
    for i, answer in sorted(answers.items()):
        if "error" in answer:
            problems.append(
                f"{names[i]} cannot import torch and diffusers ({answer['error']}); install them there again."
            )
        elif answer["devices"] < len(facts[i]["gpus"]):
            built = f"for CUDA {answer['cuda']}" if answer["cuda"] else "without CUDA"
            problems.append(
                f"{names[i]} has {len(facts[i]['gpus'])} GPUs and torch sees {answer['devices']}: it is built {built}; "
                "install a torch that fits the driver (nvidia-smi shows its CUDA version)."
            )
    return problems


def ports(fleet: Fleet, facts: Mapping[int, Any], rdzv: str | None) -> list[str]:
    """A problem if the port at which the ranks are to meet is taken."""
    _, port = parse_rendezvous(rdzv)
    first = min(facts, default=None)
    return [] if first is None else fleet.ask("serve", {first: {"port": port}})[1]


def clocks(fleet: Fleet, names: Mapping[int, str]) -> list[str]:
    """Notes about clocks that differ, because times in logs can then not be compared."""
    notes = []
    for i in sorted(names):
        before = time.time()
        answers, _ = fleet.ask("clock", {i: {}})
        off = answers[i] - (before + time.time()) / 2 if i in answers else 0.0
        if abs(off) > SKEW + (time.time() - before) / 2:
            notes.append(
                f"the clock of {names[i]} is {abs(off):.1f} s {'ahead' if off > 0 else 'behind'}; let it follow a time "
                "server."
            )
    return notes


def disks(facts: Mapping[int, Any], names: Mapping[int, str]) -> list[str]:
    """Notes about machines that work in another folder, and about disks that are nearly full."""
    notes = []
    for i, about in sorted(facts.items()):
        if about["folder"] != os.getcwd():
            notes.append(
                f"{names[i]} has no folder {os.getcwd()}; it works in {about['folder']}, where results of its ranks go."
            )
        if about["free disk"] < LITTLE_DISK:
            notes.append(
                f"{about['folder']} on {names[i]} has {about['free disk'] / 2**20:.0f} MiB left; make room for results."
            )
    return notes


def resolving(fleet: Fleet, facts: Mapping[int, Any], names: Mapping[int, str]) -> list[str]:
    """Notes about names that other hosts cannot resolve; a run then uses addresses."""
    plain = {i: names[i].rpartition("@")[2] for i in names}
    answers, _ = fleet.ask("resolve", {i: {"names": [plain[j] for j in plain if j != i]} for i in facts})
    unknown: dict[str, list[str]] = {}
    for i, answer in sorted(answers.items()):
        for name, address in answer.items():
            if not address:
                unknown.setdefault(name, []).append(names[i])
    return [
        f"{', '.join(where)} cannot resolve the name {name}; a run uses its address instead, or add it to /etc/hosts "
        "there."
        for name, where in unknown.items()
    ]


def network(fleet: Fleet, facts: Mapping[int, Any], names: Mapping[int, str]) -> tuple[list[str], list[str]]:
    """Measure latency and bandwidth from every host to every other.

    In each round every host sends to one and receives from another.

    Returns:
        The lines of a table, and a problem for each pair that does not reach each other.
    """
    order, shown, problems = sorted(facts), dict[tuple[int, int], str](), list[str]()
    for shift in range(1, len(order)):
        pairs = {i: order[(k + shift) % len(order)] for k, i in enumerate(order)}
        ports, failed = fleet.ask("echo", {j: {"seconds": 60.0} for j in order})
        problems += failed
        ways = {
            j: [names[j].rpartition("@")[2], *(a for a in facts[j]["addresses"] if not a.startswith("127."))]
            for j in order
        }
        each = {i: {"addresses": ways[j], "port": ports[j], "seconds": SECONDS} for i, j in pairs.items() if j in ports}
        answers, failed = fleet.ask("measure", each)
        problems += failed
        for i, answer in sorted(answers.items()):
            j = pairs[i]
            shown[i, j] = describe_speed(answer)
            if not answer:
                where = ", ".join(dict.fromkeys(ways[j]))
                problems.append(
                    f"{names[i]} does not reach {names[j]} at any of {where}; open the ports above 1024 between them."
                )
    rows = [[names[i], *(shown.get((i, j), "-") for j in order)] for i in order]
    return list(table(["from / to", *(names[j] for j in order)], rows)), problems


def describe_speed(answer: Mapping[str, Any]) -> str:
    """Bandwidth and latency in words."""
    if not answer:
        return "no connection"
    rate, trip = 8 * answer["bandwidth"], answer["latency"]
    return (
        f"{rate / 1e9:.2f} Gbit/s {trip * 1e3:.2f} ms"
        if rate >= 1e9
        else f"{rate / 1e6:.0f} Mbit/s {trip * 1e3:.2f} ms"
    )


__all__ = ["doctor"]
