"""Beats, blame and file names, without processes."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from xdit_core.errors import ModelError, UsageError, XditError
from xdit_core.filesystem import atomically
from xdit_core.observe.observer import Awaited, Observer
from xdit_core.observe.status import STARTING, Phase, Status
from xdit_core.outputs.names import slug, targets
from xdit_core.settings import RunSettings
from xdit_core.worker.failure import error_path, failure
from xdit_core.worker.heartbeat import SIZE, HeartbeatWriter, heartbeat_path, read_heartbeat
from xdit_core.worker.progress import Progress, Tee
from xdit_core.worker.rendezvous import RankEnv, compare, not_started
from xdit_launcher.arguments import is_setting, values_of
from xdit_launcher.node import root_cause
from xdit_launcher.node.root_cause import RankStatus, RootCause, report_lines


def names(**settings: object) -> list[list[str]]:
    return [[str(p) for p in row] for row in targets(RunSettings(**settings))]  # type: ignore[arg-type]


def test_beat(tmp_path: Path) -> None:
    path = heartbeat_path(tmp_path, 3)
    assert read_heartbeat(path) is None
    beat = HeartbeatWriter(path)
    work = Status(Phase.DENOISING, step=2, steps=9)
    beat.status(work)
    with beat.waiting(Awaited("the ring", "ring")):
        with beat.waiting(Awaited("stages", "pp", message=("stages", 7, 11))):
            pulse = read_heartbeat(path)
            assert pulse is not None and pulse.status.waiting and pulse.count == 4
            assert pulse.status == replace(work, waiting_for="stages", axis="pp", peers=(7,))
            assert str(pulse.status) == "waiting for stages (step 2 of 9)"
            assert 0 <= time.monotonic() - pulse.at < 5
        assert str((read_heartbeat(path) or pulse).status) == "waiting for the ring (step 2 of 9)"
    assert (read_heartbeat(path) or pulse).status == work and beat.count == 6
    for long in ("ü" * SIZE, "\udcff" * SIZE, '"' * SIZE):
        beat.status(Status(Phase.WRITING, long, waiting_for=long, peers=tuple(range(10**5, 10**5 + SIZE))))
        status = (read_heartbeat(path) or pulse).status
        assert status.phase == Phase.WRITING and status.waiting and len(status.detail) > 20 and len(status.peers) == 32
        assert path.stat().st_size == SIZE
    HeartbeatWriter(tmp_path / "no" / "folder").status(work)


def test_a_beat_that_is_being_written(tmp_path: Path) -> None:
    """It is read again; one that was cut off for good, as by a kill in the middle, is none."""
    path = heartbeat_path(tmp_path, 0)
    HeartbeatWriter(path).status(Status(Phase.DECODING))
    whole = path.read_bytes()
    path.write_bytes(whole[:40] + bytes(SIZE - 40))
    assert read_heartbeat(path) is None
    path.write_bytes(whole)
    assert str((read_heartbeat(path) or pytest.fail()).status) == "decoding"


def test_file_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "v1.5").mkdir()
    assert names(prompt=("a",)) == [["out.png"]]
    assert names(prompt=("a",), output_type="latent") == [["out.safetensors"]]
    assert names(prompt=("a", "b"), images=2, out="d/x.png") == [["d/x-0.png", "d/x-1.png"], ["d/x-2.png", "d/x-3.png"]]
    assert names(prompt=("a", "b"), images=2, out="x.safetensors", output_type="latent") == [
        ["x-0.safetensors"],
        ["x-1.safetensors"],
    ]
    assert names(prompt=("A red fox!", "a red fox"), out="d", seed=(4,)) == [
        ["d/a-red-fox-4.png"],
        ["d/a-red-fox-4-2.png"],
    ]
    assert names(prompt=("a",), out="new.d/", images=2, seed=(1,)) == [["new.d/a-1.png", "new.d/a-2.png"]]
    assert names(prompt=("a",), out="v1.5") == [["v1.5/a-0.png"]]
    assert (
        slug("../../etc/passwd") == "etc-passwd"
        and slug("?!") == "picture"
        and slug("Schöne Füchse") == "schöne-füchse"
    )
    assert len(slug("x" * 500)) <= 48
    run = RunSettings(prompt=("a",))
    assert targets(run, video=True) == ((Path("out.mp4"),),)
    with pytest.raises(UsageError, match=r"videos are written as MP4; use out=x\.mp4"):
        targets(dataclasses.replace(run, out="x.gif"), video=True)
    with pytest.raises(UsageError, match=r"x\.webp ends in \.webp"):
        names(prompt=("a",), out="x.webp")


def test_nothing_half_written(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    with pytest.raises(OSError), atomically(path) as temporary:
        temporary.write_text("half")
        raise OSError("disk full")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("steps=3", True),
        ("usp.ulysses=2", True),
        ("1+1=2", False),
        ("a sign: x=y", False),
        ("=x", False),
        ("prompt=", True),
    ],
)
def test_settings_and_prompts(word: str, expected: bool) -> None:
    assert is_setting(word) is expected


def test_words_in_any_order() -> None:
    assert values_of(["a fox", "steps=3", "1+1=2", "prompt=b=c"]) == (
        {"prompt": ["a fox", "1+1=2", "b=c"], "steps": "3"},
        (),
    )


STEP = Status(Phase.DENOISING, step=1, steps=2)


def fail(folder: Path, rank: int, error: BaseException, status: Status = STEP) -> None:
    """As a worker would."""
    try:
        raise error
    except BaseException as e:
        error_path(folder, rank).write_text(json.dumps(failure(e, rank, status)))


def blame(folder: Path, codes: list[int | None], stuck_for: float | None = None) -> RootCause:
    """As of ranks whose files are in a folder."""
    seen = {
        rank: RankStatus(
            "here", code, read_heartbeat(heartbeat_path(folder, rank)), root_cause.read_error(folder, rank), log="x.log"
        )
        for rank, code in enumerate(codes)
    }
    return root_cause.find_root_cause(seen, stuck_for)


LOST = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:5")


def test_own_errors_before_lost_peers(tmp_path: Path) -> None:
    fail(tmp_path, 0, LOST)
    fail(tmp_path, 2, ValueError("first"))
    fail(tmp_path, 1, ValueError("second"))
    found = blame(tmp_path, [1, 1, 1])
    assert (found.rank, found.sentence, found.code) == (2, "ValueError: first", 1)


def test_signals_before_lost_peers(tmp_path: Path) -> None:
    fail(tmp_path, 0, LOST)
    found = blame(tmp_path, [1, -11, None])
    assert (found.rank, found.code) == (1, 139) and "signal 11 (SIGSEGV)" in found.sentence


def test_an_exit_without_a_word(tmp_path: Path) -> None:
    fail(tmp_path, 0, LOST)
    assert blame(tmp_path, [1, 7]) == RootCause(
        1, "here", STARTING, "it ended with exit code 7 and left no error", 7, "x.log"
    )


def test_a_lost_host() -> None:
    seen = {rank: RankStatus("ab"[rank // 2], lost="no word from it." if rank > 1 else "") for rank in range(4)}
    found = root_cause.find_root_cause(seen)
    assert (found.rank, found.host, found.code) == (2, "b", 1)
    assert found.sentence == "ranks 2 to 3 were lost with their host: no word from it."


def test_only_lost_peers(tmp_path: Path) -> None:
    """Two ranks waited too long for the third, which still runs."""
    for rank in range(3):
        HeartbeatWriter(heartbeat_path(tmp_path, rank)).status(
            STEP if rank == 2 else replace(STEP, waiting_for="the ring")
        )
    fail(tmp_path, 0, RuntimeError("Timed out waiting 1000ms for recv operation to complete"))
    assert blame(tmp_path, [1, None, None]).rank == 2


def test_a_hang_of_all(tmp_path: Path) -> None:
    for rank, count in enumerate((5, 3, 4)):
        beat = HeartbeatWriter(heartbeat_path(tmp_path, rank))
        for _ in range(count):
            beat.status(replace(STEP, waiting_for="the ring"))
    found = blame(tmp_path, [None, None, None], stuck_for=30)
    assert found.rank == 1 and "no rank made progress for 30 s" in found.sentence


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (ModelError("the file is damaged, fetch it again."), 2, "the file is damaged, fetch it again."),
        (SystemExit(3), 3, "the process left with exit code 3 before its work was done"),
        (SystemExit(0), 1, "the process left with exit code 0 before its work was done"),
        (MemoryError(), 137, "out of memory (MemoryError); lower height, width or images"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 137, "out of memory ("),
        (
            OSError(errno.ENOSPC, "No space left on device", "a/x.png"),
            1,
            "a/x.png cannot be written: No space left on device; make",
        ),
        (KeyError("x"), 1, "KeyError: 'x'"),
        (RuntimeError("line\nand more\nException raised from here\n#0"), 1, "RuntimeError: line and more"),
    ],
)
def test_codes_and_sentences(tmp_path: Path, error: BaseException, code: int, sentence: str) -> None:
    fail(tmp_path, 1, error)
    found = blame(tmp_path, [None, 1])
    assert found.code == code and found.sentence.startswith(sentence)
    assert len(report_lines(found, 2)) <= 5


def test_ranks_with_another_plan_are_named() -> None:
    class Shelf(dict):  # type: ignore[type-arg]
        """A store that holds what the other ranks said."""

        def set(self, key: str, value: str) -> None:
            self[key] = value.encode()

        def wait(self, keys: list[str], patience: object) -> None:
            assert all(key in self for key in keys)

    class Said(Observer):
        """Remembers what a rank was at."""

        def __init__(self) -> None:
            self.statuses: list[Status] = []

        def status(self, status: Status) -> None:
            self.statuses.append(status)

    said = Said()
    shelf = Shelf({"digest/0": b"x", "digest/2": b"y"})
    with pytest.raises(XditError, match="ranks 1 and 2 of 3 got another plan than rank 0; copy one plan"):
        compare(shelf, "z", RankEnv(rank=1, world=3), timedelta(0), said)
    compare(Shelf({"digest/0": b"x"}), "x", RankEnv(rank=1, world=2), timedelta(0), said)
    assert not said.statuses

    class Empty(Shelf):
        """Some never come."""

        def wait(self, keys: list[str], patience: object) -> None:
            raise RuntimeError("wait timeout")

        def check(self, keys: list[str]) -> bool:
            return keys[0] in self

    with pytest.raises(XditError, match="ranks 0 and 2 of 3 did not come within 0 s; start all nodes"):
        compare(Empty(), "x", RankEnv(rank=1, world=3), timedelta(0), said)
    assert [not_started(status) for status in said.statuses] == [(0, 2)]
    assert str(said.statuses[0]) == "waiting for ranks 0, 2 to start (connecting)"
    assert not_started(replace(STEP, waiting_for="the ring", peers=(1,))) == ()


@pytest.mark.parametrize(
    ("env", "part"),
    [
        ({}, "needs 2 processes but WORLD_SIZE is 1"),
        ({"WORLD_SIZE": "4"}, "needs 2 processes but WORLD_SIZE is 4"),
        ({"WORLD_SIZE": "2"}, "must be numbers"),
        ({"WORLD_SIZE": "2", "RANK": "x"}, "must be numbers"),
        (
            {"WORLD_SIZE": "2", "RANK": "5", "MASTER_ADDR": "a", "MASTER_PORT": "9"},
            "RANK=5 is not from 0 to 1; start it",
        ),
        ({"WORLD_SIZE": "2", "RANK": "-1", "MASTER_ADDR": "a", "MASTER_PORT": "9"}, "RANK=-1 is not from 0 to 1"),
        (
            {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "2", "MASTER_ADDR": "a", "MASTER_PORT": "9"},
            "LOCAL_RANK=2 is not from 0 to 1",
        ),
        (
            {"WORLD_SIZE": "2", "RANK": "1", "MASTER_PORT": "9"},
            "MASTER_ADDR and MASTER_PORT do not say where rank 0 is met",
        ),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "a"}, "MASTER_ADDR and MASTER_PORT do not say"),
    ],
)
def test_a_wrong_environment(env: dict[str, str], part: str) -> None:
    with pytest.raises(UsageError, match=part):
        RankEnv.of(env, 2)


def test_one_rank_of_a_world_of_one() -> None:
    assert RankEnv.of({}, 1) == RankEnv.of({"RANK": "0"}, 1) == RankEnv()
    for env in ({"RANK": "5"}, {"RANK": "5", "WORLD_SIZE": "1"}):
        with pytest.raises(UsageError, match="RANK=5 is not from 0 to 0"):
            RankEnv.of(env, 1)


def test_progress_in_a_log_and_on_a_terminal() -> None:
    log, terminal = io.StringIO(), io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    for screen in (log, terminal):
        progress = Progress(screen)
        progress.begin("a fox")
        for step in (1, 2, 3):
            progress.step_done(step, 3)
        progress.end()
    assert len(log.getvalue().splitlines()) == 1 and log.getvalue().startswith("step 3/3  0.00 s/step  peak ")
    assert terminal.getvalue().count("\r\x1b[K") == 5 and "[####################] step 3/3" in terminal.getvalue()
    kept = io.StringIO()
    print("a line", file=Tee(kept, terminal, before=progress.clear))  # type: ignore[type-var]
    assert kept.getvalue() == "a line\n" and terminal.getvalue().endswith("a line\n")
    gone = io.StringIO()
    gone.close()
    print("a line", file=Tee(kept, gone, before=progress.clear))  # type: ignore[type-var]
    Progress(gone := io.StringIO()).show("nothing where nobody watches")
    assert gone.getvalue() == ""
