"""Where the ranks of several machines meet: an address of the first machine that all others reach."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from xdit_core.errors import UsageError

if TYPE_CHECKING:
    from xdit_launcher.cluster.fleet import Fleet


def parse_rendezvous(rdzv: str | None) -> tuple[str, int]:
    """``[HOST:]PORT`` as host and port; "" and 0 stand for any.

    Raises:
        UsageError: it is something else.
    """
    host, _, port = (rdzv or "").rpartition(":")
    if rdzv and not (port.isdecimal() and len(port) < 6 and 0 < int(port) < 65536):
        raise UsageError(f"--rdzv {rdzv} is not PORT or HOST:PORT; write for example 29500.")
    return host.strip("[]"), int(port or 0)


def meet(fleet: Fleet, used: Sequence[int], rdzv: str | None, facts: Mapping[int, Any]) -> tuple[str, int]:
    """Let the first host listen, and find an address at which all hosts reach it.

    Args:
        used: numbers of the hosts that have ranks.
        rdzv: ``[HOST:]PORT`` at which to meet, None for any.
        facts: what each host said of itself.

    Returns:
        The address and the port.

    Raises:
        UsageError: the port is taken, or a host does not reach the first one.
    """
    wanted_host, wanted_port = parse_rendezvous(rdzv)
    first, name = used[0], fleet.hosts[used[0]].name
    port = int(fleet.must("serve", {first: {"port": wanted_port}}, kind=int)[first])
    if all(fleet.hosts[i].name == name for i in used):
        return wanted_host or "127.0.0.1", port
    choices = (
        [wanted_host] if wanted_host else [name.rpartition("@")[2], facts[first]["host"], *facts[first]["addresses"]]
    )
    reached = fleet.must("reach", {i: {"addresses": choices, "port": port} for i in used}, kind=dict)
    for choice in choices:
        ways = [reached[i].get(choice, "") for i in used]
        # Debian gives a machine's own name the address 127.0.1.1, which leads no other machine there
        if all(way and not way.startswith("127.") for way in ways):
            return ways[0] if len(set(ways)) == 1 else choice, port
    worst = min(used, key=lambda i: len(reached[i]))
    who = f"{fleet.hosts[worst].name} does not reach {name}" if worst != first else f"{name} does not answer"
    raise UsageError(
        f"{who} at port {port} of any of {', '.join(dict.fromkeys(choices))}; open the port in the firewall, or name "
        "an address and a port that are open with --rdzv HOST:PORT."
    )
