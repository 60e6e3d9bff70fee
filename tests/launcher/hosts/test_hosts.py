"""Hosts as users write them, ranks on them, and the backend that an option means."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest

from xdit_core import Registry, make_plan
from xdit_core.errors import UsageError
from xdit_launcher.backends import ssh
from xdit_launcher.backends.registry import choose
from xdit_launcher.cluster import host_facts, placement
from xdit_launcher.cluster.checks import variables_to_pass
from xdit_launcher.cluster.fleet import print_from
from xdit_launcher.cluster.host_file import filtered, parse_hosts, read_hostfile
from xdit_launcher.cluster.hosts import Host
from xdit_launcher.cluster.protocol import read_message
from xdit_launcher.cluster.rendezvous import parse_rendezvous
from xdit_launcher.node.agent import locate_model
from xdit_launcher.node.watching import SHORTEST_LIMIT, STUCK, StallLimit


def test_hosts() -> None:
    assert parse_hosts("a:8,user@b.example:4, c") == [Host("a", 8), Host("user@b.example", 4), Host("c")]
    assert parse_hosts("[fe80::1]:2,fe80::2") == [Host("fe80::1", 2), Host("fe80::2")]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a:8,,b", "an empty word is not a host name"),
        ("-oProxyCommand=x", "-oProxyCommand=x is not a host name"),
        ("a;reboot", "a;reboot is not a host name"),
        ("a:0", "0 is not a number of slots"),
        ("a:8,a:8", "names a twice"),
    ],
)
def test_hosts_that_are_none(text: str, part: str) -> None:
    with pytest.raises(UsageError, match=part):
        parse_hosts(text)


def test_a_hostfile(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text("# two\na slots=8\n\nb slots=4 python=/opt/x/bin/python  # the old one\n")
    assert read_hostfile(file) == [Host("a", 8), Host("b", 4, python="/opt/x/bin/python")]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "names no host; write lines such as host slots=8."),
        ("a slots=x", "line 1: x is not a number of slots"),
        ("a gpus=8", "line 1 has the unknown word gpus; a line is host slots=8"),
        ("a\na", "names a twice"),
        ("a:8", None),
    ],
)
def test_hostfiles_that_are_none(tmp_path: Path, text: str, part: str | None) -> None:
    file = tmp_path / "hosts"
    file.write_text(text)
    if part is None:
        assert read_hostfile(file) == [Host("a:8")]  # no such form: ssh will say that it does not resolve
        return
    with pytest.raises(UsageError, match=part):
        read_hostfile(file)


def test_no_hostfile(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read: No such file or directory; write one with lines"):
        read_hostfile(tmp_path / "nothing")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="is not UTF-8 text"):
        read_hostfile(tmp_path / "binary")


def test_filters() -> None:
    hosts = [Host("a", 4), Host("b", 4), Host("c")]
    assert filtered(hosts, "a@b:0,2", "") == [Host("a", 4), Host("b", 2, (0, 2))]
    assert filtered(hosts, "", "a@b:0,2") == [Host("b", 2, (1, 3)), Host("c")]
    assert filtered(hosts, "", "b:0,1,2,3") == [Host("a", 4), Host("c")]
    assert filtered([Host("u@a", 2), Host("b", 2)], "u@a:1@b", "") == [Host("u@a", 1, (1,)), Host("b", 2)]
    assert filtered([Host("u@a", 2), Host("b", 2)], "", "a") == [Host("b", 2)]
    for include, exclude, part in (
        ("", "b:9", "b has 4 slots, counted from 0; leave out 9"),
        ("a:0@a:1", "", "a is named twice"),
        ("a", "b", "cannot be combined"),
        ("d", "", "d is not among the hosts"),
        ("a:x", "", "devices are numbers from 0"),
        ("", "a@b@c", "leaves no host"),
        ("", "c:0", "needs the slots of c"),
    ):
        with pytest.raises(UsageError, match=part):
            filtered(hosts, include, exclude)


def test_spread() -> None:
    assert placement.spread(4, [8, 8]) == [range(0, 2), range(2, 4)]
    assert placement.spread(12, [8, 4]) == [range(0, 8), range(8, 12)]
    assert placement.spread(5, [8, 8, 1]) == [range(0, 2), range(2, 4), range(4, 5)]
    assert placement.spread(1, [8, 8]) == [range(0, 1), range(1, 1)]
    assert placement.spread(6, [4, 4], 2) == [range(0, 4), range(4, 6)]  # pairs stay together
    assert placement.spread(2, [4, 4], 2) == [range(0, 1), range(1, 2)]  # every host is used
    assert placement.spread(6, [3, 3], 2) == [range(0, 3), range(3, 6)]  # where they can
    with pytest.raises(UsageError, match="9 processes need 9 slots, and all hosts together have 8"):
        placement.spread(9, [4, 4])


def test_a_better_layout(tiny: tuple[str, ...]) -> None:
    values: dict[str, Any] = dict(word.split("=", 1) for word in tiny)

    def told(plugins: list[str], **degrees: int) -> list[str]:
        plan = make_plan(plugins, {**values, **{k.replace("_", "."): v for k, v in degrees.items()}}, Registry())
        return list(placement.warnings(plan, [range(0, plan.world // 2), range(plan.world // 2, plan.world)]))

    (line,) = told(["usp"], usp_ulysses=4, usp_ring=1)
    assert line.startswith("warning: usp.ulysses=4 spans 2 machines") and line.endswith(
        "better is usp.ulysses=2 usp.ring=2."
    )
    (line,) = told(["tp"], tp_degree=4)
    assert "tp.degree=4 spans 2 machines" in line
    assert "better is tp.degree=2 with one of cfg, dp, pipefusion across the machines." in line
    assert not told(["usp", "pipefusion"], usp_ulysses=2, usp_ring=1, pipefusion_stages=2)
    (line,) = told(["usp", "pipefusion"], usp_ulysses=4, usp_ring=1, pipefusion_stages=1)
    assert line.endswith("better is usp.ulysses=2 pipefusion.stages=2.")


def test_the_backend_that_takes_an_option() -> None:
    on, rest = choose(None, {"hosts": "a:1", "rdzv": None}, {"model": "x", "ssh.python": "/p"})
    assert (on.name, on.settings.hosts, on.settings.python, rest) == ("ssh", "a:1", "/p", {"model": "x"})
    assert choose(None, {}, {})[0].name == "local"
    assert choose(None, {"nnodes": "2", "node_rank": "0", "rdzv": "a:1"}, {})[0].name == "local"
    assert choose("slurm", {"nnodes": "2"}, {})[0].settings.nnodes == 2
    for name, options, values, part in (
        ("nothing", {}, {}, "unknown backend 'nothing' in --on"),
        ("local", {"hosts": "a"}, {}, "the backend local does not take --hosts; add --on ssh"),
        (None, {}, {"ssh.hosts": "a"}, "ssh.hosts belongs to the backend ssh; add --on ssh"),
        ("ssh", {"hosts": "a"}, {"ssh.hosts": "b"}, "say the same"),
        ("ssh", {}, {"ssh.host": "b"}, "unknown setting ssh.host; did you mean ssh.hosts?"),
        ("local", {"nnodes": "two"}, {}, "local.nnodes=two is not a whole number"),
    ):
        with pytest.raises(UsageError, match=part):
            choose(name, options, values)


def test_ssh_commands() -> None:
    settings = ssh.Settings(hosts="a:1,b:2", command="ssh -p 2222", python="/opt/my python")
    first = ssh.command_to(ssh.hosts_of(settings)[0], settings)
    assert first[:3] == ["ssh", "-p", "2222"] and first[-3:] == [
        "--",
        "a",
        "'/opt/my python' -P -m xdit_launcher.node.agent",
    ]
    assert ssh.devices(settings) == 3
    with pytest.raises(UsageError, match="give the hosts with either"):
        ssh.hosts_of(ssh.Settings())
    with pytest.raises(UsageError, match="cannot be read"):
        ssh.command_to(Host("a"), ssh.Settings(command="ssh '"))


@pytest.mark.parametrize(
    ("code", "said", "part"),
    [
        (255, ["ssh: connect to host b port 22: Connection refused"], "Connection refused; start sshd there"),
        (255, ["root@b: Permission denied (publickey)."], "make a key that this user may log in with"),
        (1, ["/usr/bin/python3: No module named xdit_launcher"], "install xdit for the interpreter there"),
        (127, ["bash: /opt/p: No such file or directory"], "name the interpreter there"),
        (2, [], "exit code 2; try by hand: ssh b"),
    ],
)
def test_what_ssh_says(code: int, said: list[str], part: str) -> None:
    assert part in ssh.explain(code, said, "b", heard=False)


def test_variables_are_passed_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("SECRET", "x")
    assert variables_to_pass(["NCCL_*"]) == {k: v for k, v in os.environ.items() if k.startswith("NCCL_")}
    assert variables_to_pass(["SECRET"]) == {"SECRET": "x"}
    with pytest.raises(UsageError, match="the variable NOT_HERE is to be passed on but is not set here"):
        variables_to_pass(["NOT_HERE"])


def test_differences() -> None:
    ours = {"versions": {"torch": "2.13.0", "x": "1"}, "python": "3.11.2", "code": {"xdit_core": "aa"}, "model": "m"}
    assert not list(host_facts.differences(ours, ours, "b"))
    other = {**ours, "versions": {"torch": "2.12.0", "x": ""}, "python": "3.12.1", "model": None}
    assert list(host_facts.differences(other, ours, "b")) == [
        "b has torch 2.12.0, and this machine 2.13.0; run pip install torch==2.13.0 there.",
        "b has no x, and this machine 1; run pip install x==1 there.",
        "b runs Python 3.12.1, and this machine 3.11.2; use the same minor version on both.",
    ]
    built = {**ours, "versions": {"torch": "2.13.0+cu130", "x": "1"}}
    assert not list(host_facts.differences(built, ours, "b"))  # the same release for other devices
    (line,) = host_facts.differences(ours, {**ours, "versions": {"torch": "2.13.0", "x": ""}}, "b")
    assert line == "b has x 1, and this machine none; install x==1 here too."
    (line,) = host_facts.differences({**ours, "code": {"xdit_core": "bb"}}, ours, "b")
    assert "the code of xdit_core on b is not that of this machine" in line
    assert host_facts.model_problem(other, ours, "b", "/m").startswith("b has no folder /m; copy the model there")
    assert "holds other files" in host_facts.model_problem({**ours, "model": "n"}, ours, "b", "/m")


def test_one_machine_by_two_names() -> None:
    one = {"host": "n1", "addresses": ["10.0.0.1", "127.0.0.1"]}
    names = {0: "a", 1: "a.example.org", 2: "b"}
    found = list(host_facts.same_machine({0: one, 1: one, 2: {**one, "addresses": ["10.0.0.2"]}}, names))
    assert found == ["a and a.example.org are one machine; name it once, with more slots."]
    assert not list(host_facts.same_machine({0: one, 1: one}, {0: "n1", 1: "n1"}))  # two actors of Ray


def test_gpus_as_nvidia_smi_shows_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr("xdit_core.machine.cuda_devices", lambda: 1)
    for text, found in (
        ("GPU X, 100, 200", [{"name": "GPU X", "free": 100 << 20, "total": 200 << 20}]),
        ("GPU X, [N/A], [N/A]", [{}]),
        ("GPU X, 1, 2\nGPU X, 1, 2", [{}]),  # CUDA_VISIBLE_DEVICES hides one
    ):
        tool.write_text(f"#!/bin/sh\nprintf '{text}\\n'\n")
        tool.chmod(0o755)
        assert host_facts.gpus() == found


def test_a_plan_for_cpus_that_nobody_asked_for() -> None:
    values = {"model": "emoji", "prompt": ["a"]}
    unsure = make_plan([], values, Registry())
    if unsure.run.device == "cpu":
        wanted = "this machine has no GPU and b has 8; choose where to run with device=cuda or device=cpu."
        assert host_facts.device_problem(unsure, True, "b has 8") == wanted
    assert not host_facts.device_problem(unsure, False, "b has 0")
    assert not host_facts.device_problem(make_plan([], {**values, "device": "cpu"}, Registry()), True, "b has 8")


def test_where_ranks_meet() -> None:
    assert parse_rendezvous(None) == ("", 0) and parse_rendezvous("29500") == ("", 29500)
    assert parse_rendezvous("a:1") == ("a", 1) and parse_rendezvous("[fe80::1]:2") == ("fe80::1", 2)
    for text in ("a", "a:0", "99999", "a:b"):
        with pytest.raises(UsageError, match="is not PORT or HOST:PORT"):
            parse_rendezvous(text)


def test_a_broken_line_of_an_agent() -> None:
    assert read_message('{"did": 1}') == {"did": 1} and read_message('{"did": @xdit {') is None


def test_what_rank_0_prints_comes_as_it_is(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    half = "\U0001f98a".encode()
    print_from(1, half[:2])
    print_from(1, half[2:])
    assert capfdbinary.readouterr().out == half


def test_the_code_of_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "xdit_made_up"
    package.mkdir()
    (package / "__init__.py").write_text("a = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = host_facts.code_digest("xdit_made_up")
    (package / "__init__.py").write_text("a = 2\n")
    assert before and host_facts.code_digest("xdit_made_up") not in ("", before)
    assert host_facts.code_digest("xdit_not_there") == ""


def test_how_long_a_run_may_stand_still() -> None:
    from xdit_core.observe.status import Phase, Status
    from xdit_core.worker.heartbeat import Heartbeat
    from xdit_launcher.node.root_cause import RankStatus

    def at(*statuses: Status) -> dict[int, RankStatus]:
        return {i: RankStatus("a", heartbeat=Heartbeat(1, 0.0, status)) for i, status in enumerate(statuses)}

    def step(number: int, waiting_for: str = "") -> Status:
        return Status(Phase.DENOISING, step=number, steps=9, waiting_for=waiting_for)

    pace = StallLimit(None)
    assert pace.seconds == STUCK
    pace.note_progress(30.0, at(step(1), Status(Phase.LOADING, "the model")))
    pace.note_progress(4.0, at(step(2), step(2, "the ring")))
    assert pace.seconds == STUCK  # the second step may still compile something
    pace.note_progress(3.0, at(step(3), step(3, "the ring")))
    assert pace.seconds == 40.0
    pace.note_progress(0.1, at(Status(Phase.DECODING), Status(Phase.DONE)))
    assert pace.seconds == STUCK
    quick = StallLimit(None)
    for number in (1, 2, 3):
        quick.note_progress(0.1, at(step(number)))
    assert quick.seconds == SHORTEST_LIMIT
    assert StallLimit(7.0).seconds == 7.0


def test_every_machine_looks_for_the_model_where_it_keeps_it() -> None:
    plan = make_plan([], {"model": "emoji", "prompt": ["a"]}, Registry())
    elsewhere = dataclasses.replace(plan, folder="/opt/of/the/launcher/xdit_emoji/pipeline")
    assert locate_model(elsewhere.to_json()).folder == plan.folder and elsewhere.digest() == plan.digest()
    unknown = dataclasses.replace(plan, folder="/no/such", model="sd3", values={"model": "sd3"})
    assert locate_model(unknown.to_json()).folder == "/no/such"
