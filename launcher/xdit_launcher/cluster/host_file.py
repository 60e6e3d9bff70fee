"""Read hosts as users write them: ``a:8,b:8``, files with lines ``host slots=N``, and filters ``a@b:0,2``.

The file and the filters have the form that DeepSpeed uses.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from xdit_core.errors import UsageError
from xdit_core.filesystem import read_text
from xdit_core.settings import did_you_mean
from xdit_launcher.cluster.hosts import Host

NAME = re.compile(r"([A-Za-z0-9_.-]+@)?[A-Za-z0-9_.:-]+")
LINE = "host slots=8"


def parse_hosts(text: str) -> list[Host]:
    """Read hosts such as ``a:8,b``, with or without slots.

    Raises:
        UsageError: something that is not a name or a number, or a host that is given twice.
    """
    hosts = []
    for item in text.split(","):
        name, sign, number = item.strip().rpartition(":")
        if (
            not sign or not number.isdecimal() or (":" in name and not name.endswith("]"))
        ):  # an IPv6 address has brackets before slots
            name, number = item.strip(), ""
        hosts.append(
            Host(
                checked_name(name.strip("[]"), f"--hosts {text}"),
                parse_slots(number, f"--hosts {text}") if number else None,
            )
        )
    return unique(hosts, f"--hosts {text}")


def read_hostfile(path: Path) -> list[Host]:
    """Read lines ``host slots=N``, with ``python=PATH`` for another interpreter; ``#`` begins a comment.

    Raises:
        UsageError: the file is missing, empty, or a line is something else.
    """
    lines = read_text(path, f"the hostfile {path}", f"write one with lines such as {LINE}").splitlines()
    hosts = []
    for number, line in enumerate(lines, 1):
        name, *words = line.split("#")[0].split() or [""]
        if not name:
            continue
        where = f"{path} line {number}"
        pairs = dict(word.partition("=")[::2] for word in words)
        if len(pairs) < len(words):
            raise UsageError(f"{where} gives an option twice; a line is {LINE}, and python=PATH if need be.")
        if unknown := sorted(set(pairs) - {"slots", "python"}):
            raise UsageError(
                f"{where} has the unknown word {', '.join(unknown)}; a line is {LINE}, and python=PATH if need be."
            )
        hosts.append(
            Host(
                checked_name(name, where),
                parse_slots(pairs["slots"], where) if "slots" in pairs else None,
                python=pairs.get("python", ""),
            )
        )
    if not hosts:
        raise UsageError(f"the hostfile {path} names no host; write lines such as {LINE}.")
    return unique(hosts, str(path))


def checked_name(name: str, where: str) -> str:
    """The name, if it is a host name that no program takes for an option.

    Raises:
        UsageError: it is not.
    """
    if not NAME.fullmatch(name) or name.startswith("-"):
        raise UsageError(f"{where}: {name or 'an empty word'} is not a host name; write for example a:8,b:8.")
    return name


def parse_slots(text: str, where: str) -> int:
    """A number of slots from its text.

    Raises:
        UsageError: it is not a number from 1 to 4096.
    """
    if not (text.isascii() and text.isdecimal() and len(text) < 9) or not 0 < int(text) <= 4096:
        raise UsageError(f"{where}: {text or 'nothing'} is not a number of slots; write 1 or more.")
    return int(text)


def unique(hosts: Sequence[Host], where: str) -> list[Host]:
    """The hosts, if none is named twice.

    Raises:
        UsageError: one is.
    """
    names = [h.name for h in hosts]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise UsageError(f"{where} names {', '.join(twice)} twice; give it once, with more slots.")
    return list(hosts)


def filtered(hosts: Sequence[Host], include: str, exclude: str) -> list[Host]:
    """The hosts that remain. The filter ``a@b:0,2`` names all of ``a``, and the devices 0 and 2 of ``b``.

    Raises:
        UsageError: a host that is not among them, both filters, or nothing left.
    """
    if include and exclude:
        raise UsageError("--include and --exclude cannot be combined; keep one.")
    if not include and not exclude:
        return list(hosts)
    option = "--include" if include else "--exclude"
    named = parse_filter(include or exclude, option, hosts)
    remaining = []
    for host in hosts:
        devices = named.get(host.name)
        if include and devices is not None:
            remaining.append(replace(host, devices=devices, slots=len(devices)) if devices else host)
        elif exclude and devices is None:
            remaining.append(host)
        elif exclude and devices:
            if host.slots is None:
                raise UsageError(
                    f"--exclude of devices needs the slots of {host.name}; write for example --hosts {host.name}:8."
                )
            others = tuple(device for device in range(host.slots) if device not in devices)
            remaining += [replace(host, devices=others, slots=len(others))] if others else []
    if not remaining:
        raise UsageError(f"{option} {include or exclude} leaves no host; name fewer.")
    return remaining


def parse_filter(text: str, option: str, hosts: Sequence[Host]) -> dict[str, tuple[int, ...]]:
    """The names in a filter, each with its devices; none given means all. The user before a name may be left out."""
    by_name = {h.name.rpartition("@")[2]: h for h in hosts}
    devices_of: dict[str, tuple[int, ...]] = {}
    plain = text
    for name, host in by_name.items():
        plain = plain.replace(host.name, name)  # whose @ is not the one between two hosts
    for item in plain.split("@"):
        name, _, numbers = item.partition(":")
        if name not in by_name:
            raise UsageError(
                f"{option} {text}: {name or 'an empty word'} is not among the hosts; {did_you_mean(name, by_name)}"
            )
        host, parts = by_name[name], [n for n in numbers.split(",") if n]
        if not all(n.isdecimal() and len(n) < 6 for n in parts):
            raise UsageError(f"{option} {text}: devices are numbers from 0; write for example {name}:0,1.")
        devices = tuple(sorted({int(n) for n in parts}))
        if host.slots is not None and devices and devices[-1] >= host.slots:
            raise UsageError(
                f"{option} {text}: {name} has {host.slots} slots, counted from 0; leave out {devices[-1]}."
            )
        if host.name in devices_of:
            raise UsageError(f"{option} {text}: {name} is named twice; write for example {name}:0,1.")
        devices_of[host.name] = devices
    return devices_of
