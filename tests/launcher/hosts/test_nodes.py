"""One run on several nodes, started by hand on each: here two launchers of one machine, which know nothing of each
other."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest
from click.testing import Result

from xdit_core.errors import UsageError
from xdit_core.testing.beats import step_of
from xdit_launcher.backends.local import Node, Settings
from xdit_launcher.node.sockets import interface_to

Launch = Callable[..., Any]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture
def pair(launch: Launch, tiny: tuple[str, ...]) -> Callable[..., list[Any]]:
    """Both launchers, node 0 first in the list, started in the other order."""

    def start(*words: str) -> list[Any]:
        port = free_port()
        node = {k: ("--nnodes", "2", "--node-rank", str(k), "--rdzv", f"127.0.0.1:{port}") for k in (0, 1)}
        found = {k: launch(*node[k], *words, *tiny, "a red fox") for k in (1, 0)}
        return [found[0], found[1]]

    return start


def test_a_picture(pair: Callable[..., list[Any]]) -> None:
    first, second = pair(
        "--plugins", "pipefusion,usp", "pipefusion.stages=2", "usp.ulysses=2", "usp.ring=1", "pipefusion.patches=2"
    )
    code, out, err = first.wait(120)
    assert (code, second.wait(60)[0]) == (0, 0), err
    assert out.startswith("out.png  ")
    assert (first.folder / "out.png").stat().st_size > 500
    logs = sorted(path.name for path in (first.folder / "runs").glob("*/rank*.log"))
    assert logs == [
        f"rank{k}.log" for k in range(4)
    ]  # each node wrote its own two, here into folders beside each other
    assert first.none_left()


def test_a_rank_of_another_node_is_killed(pair: Callable[..., list[Any]]) -> None:
    first, second = pair("--plugins", "usp,faulty", "usp.ulysses=2", "faulty.how=kill", "faulty.rank=1")
    code, _, err = second.wait(120)
    assert code == 137 and "rank 1 of 2 on " in err and "killed by signal 9" in err
    code, _, err = first.wait(60)
    assert code != 0
    assert "no rank of this node is the cause; the launcher of another node says what happened there" in err
    assert first.none_left()


def test_ctrl_c_on_one_node_ends_both(pair: Callable[..., list[Any]]) -> None:
    first, second = pair("--plugins", "usp,faulty", "usp.ulysses=2", "faulty.how=hang", "timeout=120")
    while not any(step_of(path) == 2 for path in first.folder.glob("runs/*/rank0.beat")):
        assert first.process.poll() is None
        time.sleep(0.1)
    os.kill(second.process.pid, signal.SIGTERM)
    assert second.wait(30)[0] == 130
    assert first.wait(60)[0] != 0
    assert first.none_left()


def test_refusals(say: Callable[..., Result], tiny: tuple[str, ...]) -> None:
    def told(*words: str) -> str:
        return say(*words, *tiny, "a").stderr

    assert "--nnodes, --node-rank and --rdzv go together" in told("--nnodes", "2")
    where = ("--rdzv", "127.0.0.1:29500")
    assert "--node-rank counts from 0 to nnodes - 1" in told("--nnodes", "2", "--node-rank", "2", *where)
    assert "--rdzv somewhere is not HOST:PORT" in told("--nnodes", "2", "--node-rank", "0", "--rdzv", "somewhere")
    odd = told("--nnodes", "2", "--node-rank", "0", *where, "--plugins", "pipefusion", "pipefusion.stages=3")
    assert (
        "3 processes cannot be divided evenly among 2 nodes; change the degrees, or set nproc to a multiple of" in odd
    )
    with socket.create_server(("", 0)) as server:
        taken = ("--rdzv", f"127.0.0.1:{server.getsockname()[1]}")
        text = told("--nnodes", "2", "--node-rank", "0", *taken, "--plugins", "usp", "usp.ulysses=2")
    assert "is not available on this machine" in text and "choose another with --rdzv HOST:PORT." in text


def test_places() -> None:
    node = Node.of(Settings(2, 1, "10.0.0.1:29500"))
    assert (node.address, node.port, node.ranks(8)) == ("10.0.0.1", 29500, range(4, 8))
    assert Node.of(Settings()).ranks(3) == range(3)
    for place in ("somewhere", "a:99999", ":1"):
        with pytest.raises(UsageError, match="is not HOST:PORT"):
            Node.of(Settings(2, 0, place))
    assert interface_to("127.0.0.1", 1) == "lo"
