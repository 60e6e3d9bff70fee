"""How a run on GPUs is watched, without a GPU: made-up events, logs and ranks."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from xdit_core import UsageError
from xdit_core.faults import lost_peer
from xdit_core.machine import gpu_backend
from xdit_core.observe.status import Phase, Status
from xdit_core.worker import entry
from xdit_core.worker.heartbeat import AHEAD, Heartbeat, HeartbeatWriter, Pace
from xdit_core.worker.rendezvous import RankEnv
from xdit_launcher.node import processes
from xdit_launcher.node.root_cause import RankStatus, cause_is_known, find_root_cause
from xdit_launcher.run_folders import own_files

WATCHDOG = (
    "[rank1]:[E1201 ProcessGroupNCCL.cpp:700] [PG 0 Rank 1] NCCL work WorkNCCL(SeqNum=8) timed out\n"
    "terminate called after throwing an instance of 'c10::DistBackendError'\n"
)


class Event:
    """An event of a device that stands still: nothing passes it until it is waited for."""

    def __init__(self, beat: HeartbeatWriter, passed: list[Status]) -> None:
        self.beat, self.passed = beat, passed

    def query(self) -> bool:
        return len(self.passed) > 3  # the device has caught up by then

    def synchronize(self) -> None:
        self.passed.append(self.beat.now)


def test_the_host_waits_for_the_device_of_two_steps_ago() -> None:
    beat, waited = HeartbeatWriter(None), list[Status]()
    pace = Pace(lambda: Event(beat, waited), beat)
    for step in range(1, 9):
        beat.status(Status(Phase.DENOISING, step=step, steps=8))
        pace.step_done(step, 8)
        assert len(waited) == min(4, max(0, step - AHEAD))
    assert str(waited[0]) == "waiting for its device to finish step 1 (step 3 of 8)" and waited[0].waiting
    count = beat.count
    pace.step_done(9, 9)  # an event that has passed costs no beat
    assert beat.count == count and not beat.now.waiting


def aborted(rank: int, folder: Path, step: int) -> RankStatus:
    """A rank that the watchdog of NCCL aborted."""
    log, beat = folder / f"rank{rank}.log", Heartbeat(step, 1.0, Status(Phase.DENOISING, step=step, steps=9))
    log.write_text("drawing\n" + WATCHDOG)
    error = processes.aborted_by_nccl(rank, "a", beat, log)
    return RankStatus("a", -signal.SIGABRT, beat, error, log=str(log))


def test_a_rank_that_nccl_aborted_is_never_the_cause(tmp_path: Path) -> None:
    killed = RankStatus("b", -signal.SIGKILL, Heartbeat(9, 1.0, Status(Phase.DENOISING, step=5, steps=9)))
    victims = {0: aborted(0, tmp_path, 2), 1: aborted(1, tmp_path, 3)}
    assert not cause_is_known(victims) and cause_is_known({**victims, 2: killed})
    cause = find_root_cause({**victims, 2: killed})
    assert (cause.rank, cause.code) == (2, 137) and "SIGKILL" in cause.sentence
    hung = RankStatus("b", None, Heartbeat(9, 1.0, Status(Phase.DENOISING, step=5, steps=9)))
    waiting = RankStatus("a", None, Heartbeat(2, 1.0, Status(Phase.DENOISING, step=5, steps=9, waiting_for="x")))
    others = {rank: RankStatus("a", -6, waiting.heartbeat, victims[0].error) for rank in (0, 1)}
    cause = find_root_cause({**others, 2: hung, 3: waiting})
    assert cause.rank == 2 and cause.sentence == "the other ranks lost their connection and this one is behind"


def test_without_another_cause_the_words_of_nccl_are_shown(tmp_path: Path) -> None:
    cause = find_root_cause({0: aborted(0, tmp_path, 3), 1: aborted(1, tmp_path, 2)})
    assert cause.rank == 1 and cause.code == 134
    assert cause.sentence.startswith("DistBackendError: NCCL aborted the rank: [rank1]:[E1201 ProcessGroupNCCL")


def test_another_abort_is_a_cause(tmp_path: Path) -> None:
    log = tmp_path / "rank0.log"
    log.write_text("double free or corruption\n")
    assert processes.aborted_by_nccl(0, "a", None, log) is None
    assert processes.aborted_by_nccl(0, "a", None, tmp_path / "absent.log") is None
    cause = find_root_cause({0: RankStatus("a", -signal.SIGABRT), 1: RankStatus("a")})
    assert cause.rank == 0 and "SIGABRT" in cause.sentence


@pytest.mark.parametrize(
    "text", ["NCCL communicator was aborted on rank 0.", "Watchdog caught collective operation timeout: x"]
)
def test_errors_of_nccl_are_those_of_a_victim(text: str) -> None:
    assert lost_peer(RuntimeError(text))
    assert lost_peer(torch.distributed.DistBackendError("NCCL error: remote process exited"))


def test_the_flight_recorder_writes_into_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment: dict[str, str] = {"TORCH_FR_BUFFER_SIZE": "7"}
    monkeypatch.setattr(os, "environ", environment)
    entry.record_flights(tmp_path)
    assert environment["TORCH_NCCL_DEBUG_INFO_TEMP_FILE"] == str(tmp_path / "nccl-rank")
    assert environment["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1" and environment["TORCH_FR_BUFFER_SIZE"] == "7"
    (tmp_path / "nccl-rank0").write_bytes(b"dump")
    os.mkfifo(tmp_path / "nccl-rank0.pipe")
    assert [path.name for path in own_files(tmp_path) or ()] == ["nccl-rank0", "nccl-rank0.pipe"]


def test_a_run_that_stands_still_is_asked_for_a_dump(tmp_path: Path) -> None:
    for rank in (0, 1):
        os.mkfifo(tmp_path / f"nccl-rank{rank}.pipe")
    reader = os.open(tmp_path / "nccl-rank0.pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert processes.ask_for_flights(tmp_path, range(3)) == 1  # nobody reads the second, the third is not there
        assert os.read(reader, 16) == b"1\n"
    finally:
        os.close(reader)


def share(folder: Path, **env: str) -> Any:
    """Two ranks on this machine."""
    return processes.NodeShare(folder, range(2), 2, "127.0.0.1", 1, env=env)


def test_ranks_share_a_gpu_if_asked_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xdit_core.machine.cuda_devices", lambda: 1)
    monkeypatch.delenv("XDIT_BACKEND", raising=False)
    with pytest.raises(UsageError, match=r"2 processes need 2 GPUs and .* has 1; .* XDIT_BACKEND=gloo"):
        share(tmp_path).check("cuda")
    for name in ("gloo", "nccl-shared"):
        share(tmp_path, XDIT_BACKEND=name).check("cuda")
    with pytest.raises(UsageError, match="XDIT_BACKEND=mpi is not known; set it to gloo or nccl-shared, or leave it"):
        gpu_backend({"XDIT_BACKEND": "mpi"})
    assert gpu_backend({}) == "nccl"


def test_a_rank_takes_its_gpu_or_shares_one(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    plan: Any = type("P", (), {"device": "cuda", "run": type("R", (), {"threads": 1})})
    place = RankEnv(rank=3, world=4, local_rank=3, local_world=4, address="x", port=1)
    monkeypatch.delenv("XDIT_BACKEND", raising=False)
    with pytest.raises(UsageError, match=r"4 processes on x but only 2 GPUs; .* XDIT_BACKEND=gloo"):
        entry.take_device(plan, place)
    monkeypatch.setenv("XDIT_BACKEND", "gloo")
    entry.take_device(plan, place)
    assert taken == [1]
