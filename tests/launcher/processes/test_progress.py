"""The progress line: how long it will still take, what is being loaded, also over a connection; and times that add
up."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import struct
import sys
import termios
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from xdit_core.engine.engine import Engine
from xdit_core.engine.loading import load_pipeline
from xdit_core.observe.observer import Observer
from xdit_core.observe.status import Phase, Status
from xdit_core.planning.planner import make_plan
from xdit_core.points.request import Output, joined
from xdit_core.printable import columns
from xdit_core.settings import parse_words
from xdit_core.worker.heartbeat import HeartbeatWriter
from xdit_core.worker.progress import Progress, duration
from xdit_core.worker.rendezvous import COLUMNS_VARIABLE, RankEnv
from xdit_core.worker.writer import Writer
from xdit_launcher.cluster.fleet import print_from
from xdit_launcher.cluster.run import terminal_variables


def frames(text: str) -> list[str]:
    """What stood on the line, one after the other."""
    return text.split("\r\x1b[K")


def test_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the pace of the steps after the first, which is slower."""
    now = [100.0]
    monkeypatch.setattr("xdit_core.worker.progress.time.monotonic", lambda: now[0])
    screen = io.StringIO()
    progress = Progress(screen, 200)
    progress.begin("a fox")
    for step, took in ((1, 30.0), (2, 10.0), (3, 10.0), (20, 170.0)):
        now[0] += took
        progress.step_done(step, 20)
    shown = frames(screen.getvalue())
    assert "left" not in shown[2] and "step 2/20  about 3 min 0 s left  10.00 s/step" in shown[3]
    assert "step 3/20  about 2 min 50 s left" in shown[4] and "left" not in shown[5]
    assert [duration(s) for s in (0.4, 59.4, 59.6, 3599.6, 7500)] == [
        "0 s",
        "59 s",
        "1 min 0 s",
        "1 h 0 min",
        "2 h 5 min",
    ]


def test_what_is_being_loaded_is_shown(tiny_sd3_folder: Path, tiny: tuple[str, ...]) -> None:
    import torch

    from xdit_core.registry.registry import Registry

    statuses: list[Status] = []

    class Said(Observer):
        def status(self, status: Status) -> None:
            statuses.append(status)

    spec, _ = Registry().model("sd3")
    load_pipeline(spec, tiny_sd3_folder, range(4), torch.device("cpu"), torch.float32, observer=Said())
    said = [str(status) for status in statuses]
    assert {f"loading the model: {name}" for name in ("text_encoder", "vae", "transformer")} <= set(said)
    screen = io.StringIO()
    progress = Progress(screen, 40)
    others = (replace(statuses[0], waiting_for="rank 1"), Status(Phase.DENOISING, step=1, steps=3))
    for status in (*statuses, *others):
        progress.status(status)
    assert frames(screen.getvalue())[1:] == said
    Progress(log := io.StringIO()).status(statuses[0])
    assert log.getvalue() == ""


def test_a_bar_over_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher, which has the terminal, tells rank 0 how wide it is: rank 0 sees a pipe."""
    near, far = pty.openpty()
    with os.fdopen(far, "w") as terminal:
        os.set_blocking(near, False)
        fcntl.ioctl(far, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 50, 0, 0))
        monkeypatch.setattr(sys, "stderr", terminal)
        env = terminal_variables()
        assert env == {COLUMNS_VARIABLE: "50"}
        place = RankEnv.of({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1", **env}, 1)
        read, write = os.pipe()
        with os.fdopen(write, "w") as screen:
            progress = Progress(screen, place.columns)
            progress.begin("狐" * 40)
            progress.step_done(2, 4)
        with os.fdopen(read, newline="") as pipe:
            lines = frames(pipe.read())
        assert lines[2].startswith("[##########..........] step 2/4") and max(sum(map(columns, x)) for x in lines) < 50
        monkeypatch.setattr(sys, "stdout", io.StringIO())
        print_from(
            1, b"fox.png  1.0 s\n"
        )  # the bar is taken away before a line comes, whichever of the two pipes is faster
        assert os.read(near, 100) == b"\r\x1b[K" and sys.stdout.getvalue() == "fox.png  1.0 s\n"  # type: ignore[attr-defined]
    os.close(near)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert terminal_variables() == {}


@pytest.fixture
def slow_phases(tiny: tuple[str, ...]) -> Iterator[Engine]:
    """An engine of which each part takes a while."""
    engine = Engine(make_plan([], parse_words([*tiny, "prompt=a fox", "output_type=image"])))

    def slower(owner: Any, name: str) -> None:
        inner = getattr(owner, name)

        def outer(*args: Any, **kwargs: Any) -> Any:
            time.sleep(0.2)
            return inner(*args, **kwargs)

        setattr(owner, name, outer)

    slower(engine.pipe, "encode_prompt")
    slower(engine.pipe.scheduler, "step")
    slower(engine, "decode")
    yield engine
    engine.close()


def test_phases_add_up(slow_phases: Engine) -> None:
    """Their sum is the time that a request takes; a decoder that is called for each part of the latents is still
    decoding."""
    engine = slow_phases
    start = time.perf_counter()
    output = engine.generate("a fox")
    assert sum(output.seconds.values()) == pytest.approx(time.perf_counter() - start, abs=0.05)
    once = output.seconds["decode"]
    assert once >= 0.2 and output.seconds["encode"] >= 0.2 and output.seconds["denoise"] >= 0.6
    whole = engine.pipe.vae.decode

    def in_parts(latents: Any, *args: Any, **kwargs: Any) -> Any:
        whole(latents, *args, **kwargs)
        return whole(latents, *args, **kwargs)

    engine.pipe.vae.decode = in_parts
    assert engine.generate("a fox").seconds["decode"] >= 0.4


def test_parts_that_were_made_in_turn() -> None:
    """Of a pipeline that draws one picture a call; parts that were made at once on several ranks took as long as the
    longest."""

    def parts() -> list[Output]:
        return [Output("a", numbers=range(i, i + 1), seconds={"denoise": 2.0 + i, "encode": 1.0}) for i in range(3)]

    assert joined(parts(), in_turn=True)[0].seconds == {"denoise": 9.0, "encode": 3.0}
    assert joined(parts())[0].seconds == {"denoise": 4.0, "encode": 1.0}


def test_the_printed_times_add_up(
    tiny: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against a time of loading among the parts of a sum that does not hold it."""
    monkeypatch.chdir(tmp_path)
    plan = make_plan([], parse_words([*tiny, "prompt=a fox"]))
    writer = Writer(plan, 0, Progress(None), HeartbeatWriter(None), tmp_path)
    writer.engine_built(7.0)
    times = {"encode": 1.0, "denoise": 2.0, "decode": 0.5}
    writer.output_done(Output("a fox", images=[Image.new("RGB", (32, 32))], seconds=times))
    assert (
        capsys.readouterr().out == "out.png  3.5 s (encode 1.0, denoise 2.0, decode 0.5; loading took 7.0 s before)\n"
    )
