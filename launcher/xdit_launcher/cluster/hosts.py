"""The machines of a run, and how many processes each of them takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xdit_core import machine


@dataclass(frozen=True)
class Host:
    """A machine of a run.

    Args:
        name: as the user calls it.
        slots: the most ranks on it; None stands for its number of GPUs, or of cores if it has no GPU.
        devices: numbers of the GPUs to use; none given means all of them.
        python: path of the Python interpreter there, "" for the path of the launcher's own.
        sharing: how many hosts of this run are the same machine.
    """

    name: str
    slots: int | None = None
    devices: tuple[int, ...] = ()
    python: str = ""
    sharing: int = 1


def slots(host: Host, facts: Mapping[str, Any], device: str | None) -> int:
    """The most ranks on a host.

    Args:
        facts: what the host said of itself, see `xdit_launcher.cluster.host_facts.about`.
        device: ``cpu`` or ``cuda``.
    """
    gpus = 0 if device == "cpu" else len(facts["gpus"])
    return host.slots or len(host.devices) or gpus or int(facts["cores"])


def devices(hosts: Sequence[Host]) -> int:
    """How many processes suit the hosts. A host whose slots are not given counts as much as this machine."""
    return sum(h.slots or len(h.devices) or machine.cuda_devices() or machine.cores() for h in hosts)
