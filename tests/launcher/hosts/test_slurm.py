"""A real Slurm of two nodes on this machine."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.launcher import FAULTY, slurm_cluster
from helpers.launcher.slurm_cluster import slurm
from helpers.launcher.typed import SMALL, USP, lose_a_rank, pixels, xdit
from xdit_core.testing.beats import step_of
from xdit_launcher import Gang


@pytest.fixture(scope="module")
def slurm_env(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    if slurm_cluster.missing():
        pytest.skip(slurm_cluster.missing())
    with slurm(tmp_path_factory.mktemp("slurm")) as env:
        yield env


@pytest.mark.slow
def test_slurm(slurm_env: dict[str, str], tmp_path: Path) -> None:
    words = ("--on", "slurm", *USP, *SMALL)
    inside = xdit(tmp_path, *words, "out=a.png", before=("salloc", "--quiet", "--nodes=2"), env=slurm_env)
    assert inside.returncode == 0 and inside.stdout.startswith("a.png  "), inside.stderr
    assert "usp.ulysses=2 spans 2 machines" in inside.stderr
    outside = xdit(tmp_path, *words, "--nnodes", "2", "slurm.wait=yes", "out=b.png", env=slurm_env)
    assert outside.returncode == 0 and "batch job" in outside.stderr, outside.stderr
    (log,) = tmp_path.glob("runs/*/slurm.out")
    assert "b.png  " in log.read_text()
    assert pixels(tmp_path / "a.png") == pixels(tmp_path / "b.png")
    shown = xdit(
        tmp_path, *words, "--nnodes", "2", "--dry-run", "slurm.options=--partition=all --time=5", env=slurm_env
    ).stdout
    for part in (
        "#SBATCH --nodes=2",
        "#SBATCH --partition=all",
        "#SBATCH --time=5",
        "-m xdit_launcher.backends.slurm ",
    ):
        assert part in shown
    unsure = xdit(tmp_path, *(w for w in words if w != "device=cpu"), env=slurm_env)
    assert unsure.returncode == 2 and "this machine has no GPU and the nodes may have some" in unsure.stderr
    spaced = xdit(
        tmp_path, *words, "runs=a folder", "slurm.options=--comment='a b'", "slurm.wait=yes", "out=c.png", env=slurm_env
    )
    assert spaced.returncode == 0 and (tmp_path / "c.png").exists(), spaced.stderr
    refused = xdit(tmp_path, *words, "slurm.options=--partition=none", env=slurm_env)
    assert refused.returncode == 2 and "Slurm refuses the job" in refused.stderr and "partition" in refused.stderr
    many = xdit(tmp_path, *words, "--nnodes", "3", before=("salloc", "--quiet", "--nodes=2"), env=slurm_env)
    assert many.returncode == 2 and "--nnodes 3 but the allocation has 2 nodes" in many.stderr


@pytest.mark.slow
def test_slurm_failures(slurm_env: dict[str, str], tmp_path: Path) -> None:
    path = os.pathsep.join([str(FAULTY), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)
    words = ("--on", "slurm", "--plugins", "usp,faulty", "usp.ulysses=2", "faulty.how=kill", "faulty.rank=1", *SMALL)
    done = xdit(tmp_path, *words, before=("salloc", "--quiet", "--nodes=2"), env=slurm_env, PYTHONPATH=path)
    assert done.returncode == 137 and "rank 1 of 2 on n2 failed at: step 2 of 3" in done.stderr, done.stderr
    batch = xdit(tmp_path, *words, "--nnodes", "2", env=slurm_env, PYTHONPATH=path)
    number = batch.stderr.partition("batch job ")[2].partition(";")[0]
    folder = max(tmp_path.glob("runs/*"))

    def state() -> str:
        shown = subprocess.run(["scontrol", "show", "job", number], env=slurm_env, capture_output=True, text=True)
        return shown.stdout.partition("JobState=")[2].partition(" ")[0]

    command = [sys.executable, "-P", "-m", "xdit_launcher.cli", "--on", "slurm", "slurm.wait=yes"]
    command += ["model=emoji", "device=cpu", "steps=4000", "a"]
    long = subprocess.Popen(command, cwd=tmp_path, env=slurm_env, stderr=subprocess.PIPE, text=True)
    assert long.stderr
    line = next(text for text in long.stderr if text.startswith("batch job "))
    long.send_signal(signal.SIGINT)
    assert "is cancelled" in long.stderr.read() and long.wait(30) == 130
    queue = ["squeue", "-h", "-j", line.split()[2].strip(";"), "-t", "R,PD"]
    assert not subprocess.run(queue, env=slurm_env, capture_output=True, text=True).stdout.strip()
    end = time.monotonic() + 60
    while state() not in ("FAILED", "COMPLETED", "CANCELLED") and time.monotonic() < end:
        time.sleep(0.5)
    assert state() == "FAILED"
    assert "rank 1 of 2 on n2 failed at: step 2 of 3" in (folder / "slurm.out").read_text()


@pytest.mark.slow
def test_the_agent_of_a_slurm_node_is_killed(slurm_env: dict[str, str], tmp_path: Path) -> None:
    command = ["salloc", "--quiet", "--nodes=2", sys.executable, "-P", "-m", "xdit_launcher.cli", "--on", "slurm", *USP]
    command += ["model=emoji", "device=cpu", "steps=4000", "timeout=300", "a"]
    run = subprocess.Popen(command, cwd=tmp_path, env=slurm_env, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while not all(map(step_of, [*tmp_path.glob("runs/*/rank1.beat")] or [Path(os.devnull)])):
        assert time.monotonic() < end and run.poll() is None
        time.sleep(0.1)
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            agent = entry.name.isdigit() and "xdit_launcher.node.agent" in (entry / "cmdline").read_text()
            if agent and "SLURMD_NODENAME=n2\0" in (entry / "environ").read_text(errors="replace"):
                os.kill(int(entry.name), signal.SIGKILL)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 1 and "rank 1 of 2 on n2 failed at: " in err, err
    assert "it was lost with its host: " in err


@pytest.mark.slow
def test_a_gang_over_two_nodes(slurm_env: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers requests; a killed rank ends it with the report."""
    command = ["salloc", "--nodes=2", "--no-shell"]
    granted = subprocess.run(command, env=slurm_env, capture_output=True, text=True, check=True).stderr
    number = granted.partition("job allocation ")[2].split()[0]
    within = {"SLURM_JOB_ID": number, "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]"}
    for name, value in {**slurm_env, **within}.items():
        monkeypatch.setenv(name, value)
    settings = {"model": "emoji", "device": "cpu", "threads": 1, "usp.ulysses": 2, "usp.ring": 1}
    try:
        with Gang(["usp"], {**settings, "runs": str(tmp_path / "runs")}, on="slurm") as gang:
            first, second = (gang.generate("red heart", steps=2, seed=5) for _ in range(2))
            assert first.pictures == second.pictures
            lose_a_rank(gang, tmp_path, r"rank 1 of 2 on n2 failed at")
    finally:
        subprocess.run(["scancel", number], env=slurm_env, capture_output=True)
