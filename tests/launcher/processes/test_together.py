"""Ranks that stop, go on and wait together: Ctrl-Z, machines that never come, and hosts that answer oddly."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from helpers.launcher import FAULTY
from xdit_core.observe.status import STARTING, Phase, Status
from xdit_core.testing.beats import step_of
from xdit_core.worker.heartbeat import Heartbeat
from xdit_core.worker.rendezvous import waiting_to_start
from xdit_launcher.backends.local import Node, command_for
from xdit_launcher.cluster import host_facts
from xdit_launcher.cluster.checks import check_hosts
from xdit_launcher.cluster.connection import PipeConnection
from xdit_launcher.cluster.fleet import Fleet
from xdit_launcher.cluster.hosts import Host
from xdit_launcher.cluster.protocol import MARK, read_message
from xdit_launcher.node.root_cause import RankStatus
from xdit_launcher.node.watching import Watch, watch

Launch = Callable[..., Any]
STEP = Status(Phase.DENOISING, step=1, steps=2)


def state(pid: int | str) -> str:
    """``T`` for a process that is stopped, "" for none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return ""


def wait_for(true: Callable[[], object], seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.05)
    return bool(true())


def test_ctrl_z_stops_the_whole_run_and_it_goes_on(launch: Launch, tiny: tuple[str, ...]) -> None:
    """The ranks stop with the launcher and go on with it, and the run ends well."""
    words = [w for w in tiny if not w.startswith("steps")]
    run = launch("--plugins", "usp", *words, "usp.ulysses=2", "steps=60", "a red fox")
    assert wait_for(lambda: any(map(step_of, run.folder.glob("runs/*/rank1.beat"))))
    run.process.send_signal(signal.SIGTSTP)
    assert wait_for(lambda: state(run.process.pid) == "T", 5)
    workers = run.left_over()
    assert len(workers) == 2 and wait_for(lambda: all(state(pid) == "T" for pid in workers), 5)
    time.sleep(1)
    assert all(state(pid) == "T" for pid in workers)
    run.process.send_signal(signal.SIGCONT)
    code, out, err = run.wait()
    assert code == 0 and out.startswith("out.png"), err
    assert run.none_left()


def test_an_interruption_ends_ranks_that_are_stopped(launch: Launch, tiny: tuple[str, ...]) -> None:
    run = launch(*tiny, "--plugins", "faulty", "faulty.rank=0", "faulty.how=hang", "a red fox")
    assert wait_for((run.folder / "fault-time").exists)
    (worker,) = run.left_over()
    os.kill(int(worker), signal.SIGSTOP)
    run.process.send_signal(signal.SIGINT)
    assert run.wait(20)[0] == 130 and run.none_left()


@pytest.fixture
def agent() -> Iterator[subprocess.Popen[str]]:
    """An agent that takes half a second of silence for the end."""
    code = "import xdit_launcher.node.agent as a; a.SILENCE = 0.5; a.main()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.wait()


def test_an_agent_that_was_told_to_pause_waits_in_silence(agent: subprocess.Popen[str]) -> None:
    assert agent.stdin and agent.stdout

    def ask(do: str, number: int) -> dict[str, Any]:
        assert agent.stdin and agent.stdout
        agent.stdin.write(json.dumps({"do": do, "id": number}) + "\n")
        agent.stdin.flush()
        for line in agent.stdout:
            if f'"did": {number}' in line:
                found: dict[str, Any] = json.loads(line.removeprefix(MARK))
                return found
        raise AssertionError("it has gone")

    assert "result" in ask("pause", 1)
    time.sleep(1.5)
    assert agent.poll() is None and "result" in ask("resume", 2)
    assert agent.wait(5) == 0  # silence counts again


def test_a_fleet_that_was_stopped_takes_nobody_for_lost() -> None:
    said: list[Mapping[str, Any]] = []

    class Link:
        silence = 10.0

        def send(self, message: Mapping[str, Any]) -> None:
            said.append(message)

        def close(self) -> None:
            pass

    with Fleet([Host("a")], lambda i, deliver: Link()) as fleet:
        fleet.ranks_of, fleet.statuses = [range(1)], {0: RankStatus("a")}
        with fleet.suspension.installed():
            fleet.heard[0] -= 100  # as after a long stop
            fleet.suspension.pause()
            fleet.suspension.resume()
        assert not fleet.look()[0].lost
        fleet.heard[0] -= 100
        assert fleet.look()[0].lost
    assert [m["do"] for m in said if m["do"] != "ping"] == ["pause", "resume"]


def test_a_watch_that_was_stopped_itself_blames_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a laptop's sleep: no look takes so long because of the ranks."""
    monkeypatch.setattr("xdit_launcher.node.watching.ASLEEP", 0.2)
    codes = iter([None, None, None, 0])

    def look() -> Mapping[int, RankStatus]:
        time.sleep(0.3)
        return {0: RankStatus("a", next(codes), Heartbeat(1, 0.0, STEP))}

    assert watch(look, Watch(timeout=0.25)) is None


def seen(*statuses: Status, start: int = 0) -> dict[int, RankStatus]:
    return {start + i: RankStatus("here", None, Heartbeat(3, 0.0, status)) for i, status in enumerate(statuses)}


def test_a_node_that_has_not_come_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["xdit-launch", "--nnodes", "3", "--node-rank", "0", "--rdzv", "a:29500", "a fox"])
    first, second = Node(0, 3, "a", 29500), Node(1, 3, "a", 29500)
    waits = waiting_to_start([2, 3, 4, 5])
    assert first.absent(seen(waits, waits), 6).startswith(
        "nodes 1 and 2 have not come to a:29500; start each with its own --node-rank"
    )
    waits = waiting_to_start([4, 5])
    one = "node 2 has not come to a:29500; start it with: xdit-launch --nnodes 3 --node-rank 2 --rdzv a:29500 'a fox'"
    assert first.absent(seen(waits, waits), 6) == one
    assert second.absent(seen(*[waiting_to_start([0])] * 2, start=2), 6).startswith(
        "node 0 has not come to a:29500; start it with: "
    )
    assert first.absent(seen(waits, Status(Phase.IMPORTING, "torch")), 6) == ""
    assert first.absent(seen(STEP, STEP), 6) == ""
    assert first.absent(seen(*[waiting_to_start([1])] * 2), 6) == ""  # it is on its way
    assert command_for(1, ["--config", "x"]) == "the same command and --node-rank 1"


def test_a_peer_that_never_comes(launch: Launch, tiny: tuple[str, ...]) -> None:
    """Two nodes started by hand, one of them alone; the sentence says how to start the other."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    where = ("--nnodes", "2", "--node-rank", "0", "--rdzv", f"127.0.0.1:{port}")
    run = launch(*where, "--plugins", "usp", *tiny, "usp.ulysses=2", "timeout=14", "a red fox")
    code, _, err = run.wait()
    assert code == 1
    assert (
        f"waiting: node 1 has not come to 127.0.0.1:{port}; start it with: xdit-launch --nnodes 2 --node-rank 1 " in err
    )
    lines = err.splitlines()
    assert lines[-3].startswith("rank 0 of 2 on ") and "failed at: waiting for rank 1 to start" in lines[-3]
    assert lines[-2].startswith("  node 1 has not come") and "behind" not in err


@pytest.mark.parametrize("answer", ["[1, 2]", "7", "[" * 100000, '{"did": ', "null"])
def test_a_line_that_is_no_map(answer: str) -> None:
    assert read_message(answer) is None


ODD_ANSWERS = {
    "text": '{"did": N, "result": "yes"}',
    "empty": '{"did": N, "result": {}}',
    "nothing": '{"did": N}',
    "types": '{"did": N, "result": TYPES}',
    "news": '{"seen": {"0": 5}, "wall": "now"}',
    "screen": '{"screen": 1, "data": 5}',
    "failed": '{"did": N, "failed": ["no"]}',
}


@pytest.mark.parametrize("name", list(ODD_ANSWERS))
def test_a_host_that_answers_oddly_is_named(name: str) -> None:
    """Another version, or another program that answers."""
    types = json.dumps(dict.fromkeys(host_facts.about([], [], ""), 5))
    line = MARK + ODD_ANSWERS[name].replace("TYPES", types).replace("N", "1") + "\n"
    code = f"import sys; sys.stdin.readline(); sys.stdout.write({line!r}); sys.stdout.flush(); sys.stdin.read()"
    command = [sys.executable, "-c", code]
    with Fleet(
        [Host("far")], lambda i, deliver: PipeConnection(command, i, "far", deliver, lambda *_: "gone")
    ) as fleet:
        found, problems = check_hosts(fleet, None)
    assert found == {} and len(problems) == 1
    assert problems[0].startswith("far: ") and ("is not understood" in problems[0] or name == "failed")


def worker(plan: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "xdit_core.worker", str(plan)],
        cwd=plan.parent,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "cannot be read as a plan (JSONDecodeError"),
        ("[]", "cannot be read as a plan (TypeError"),
        ("7", "cannot be read as a plan"),
        ('{"run": 5}', "cannot be read as a plan"),
        ("[" * 100000, "cannot be read as a plan (RecursionError"),
        ("\x00\xff", "is not UTF-8 text"),
    ],
)
def test_a_worker_by_hand_with_no_plan(tmp_path: Path, text: str, part: str) -> None:
    (tmp_path / "plan.json").write_bytes(text.encode("latin-1"))
    found = worker(tmp_path / "plan.json")
    assert found.returncode == 2 and part in found.stderr and len(found.stderr.splitlines()) == 1
    assert "write one with xdit-launch run --dry-run --json" in found.stderr


def test_a_worker_by_hand_says_sentences(launch: Launch, tiny: tuple[str, ...], tmp_path: Path) -> None:
    plan, two = tmp_path / "plan.json", tmp_path / "two.json"
    plan.write_text(launch("--dry-run", "--json", "--plugins", "faulty", "faulty.rank=0", *tiny, "a fox").wait()[1])
    two.write_text(
        launch("--dry-run", "--json", "--plugins", "usp", "usp.ulysses=2", *tiny, "timeout=1", "a fox").wait()[1]
    )
    path = os.pathsep.join([str(FAULTY), os.environ.get("PYTHONPATH", "")])
    found = worker(plan, PYTHONPATH=path)
    assert found.returncode != 0 and "Traceback" not in found.stderr, found.stderr
    assert "ValueError: a number that is no number" in found.stderr.splitlines()[-1]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    found = worker(two, WORLD_SIZE="2", RANK="1", LOCAL_RANK="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    assert "rank 1 waits for rank 0 at 127.0.0.1:" in found.stderr and "Traceback" not in found.stderr
    assert f"  rank 0 does not answer at 127.0.0.1:{port} (" in found.stderr.splitlines()[-1]


def test_an_unknown_error_of_a_worker_by_hand(tmp_path: Path) -> None:
    """The sentence comes with a file that holds the traceback; one that is meant for users needs none."""
    from xdit_core.errors import UsageError
    from xdit_core.worker.entry import by_hand
    from xdit_core.worker.failure import failure
    from xdit_core.worker.rendezvous import RankEnv

    said = by_hand(failure(KeyError("x\n\x1b"), 1, STEP), RankEnv(rank=1, world=2), tmp_path)
    path = tmp_path / "rank1.traceback.txt"
    first, second = said.splitlines()
    assert first == "rank 1 of 2 failed at: step 1 of 2" and second.endswith(f"; the traceback is in {path}")
    assert second.startswith("  KeyError: ") and "KeyError" in path.read_text()
    assert by_hand(failure(UsageError("out=x is wrong."), 0, STARTING), RankEnv(), tmp_path) == "out=x is wrong.\n"
    assert "KeyError" in by_hand(failure(KeyError("x"), 0, STARTING), RankEnv(), tmp_path / "no")
