"""Hosts over ssh on this machine; manifests; and a backend of somebody else's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from click.testing import Result

from helpers.launcher import FAULTY
from helpers.launcher.cluster import Cluster, cluster, missing
from helpers.launcher.typed import SMALL, USP, lose_a_rank, pixels, xdit
from helpers.schemas import check_schema
from xdit_core import RequestCancelled
from xdit_launcher import Gang


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if missing():
        pytest.skip(missing())
    with cluster(tmp_path_factory.mktemp("hosts"), [FAULTY]) as made:
        yield made


@pytest.mark.slow
def test_a_gang_over_two_hosts(hosts: Cluster, tmp_path: Path) -> None:
    """Requests, events, a cancelled one, and a rank of the other host that is killed."""
    settings = {"model": "emoji", "device": "cpu", "threads": 1, "usp.ulysses": 2, "usp.ring": 1}
    settings["runs"] = str(tmp_path / "runs")
    backend = {"ssh.hosts": "alpha:1,beta:1", "ssh.command": str(hosts.ssh)}
    with Gang(["usp"], {**settings, **backend}, on="ssh") as gang:
        first = gang.generate("red heart", steps=3)
        job = gang.submit("red heart", steps=400)
        next(event for event in job.events(timeout=60) if event.kind == "step")
        job.cancel()
        with pytest.raises(RequestCancelled):
            job.result(timeout=60)
        assert gang.generate("red heart", steps=3).pictures == first.pictures
        lose_a_rank(gang, tmp_path, r"rank 1 of 2 on beta failed at")
    with Gang(["usp"], settings) as here:
        assert here.generate("red heart", steps=3).pictures == first.pictures
    assert not hosts.left()


@pytest.mark.slow
def test_two_hosts_give_the_picture_of_one(hosts: Cluster, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("alpha slots=2\nbeta slots=2\n")
    words = (
        "--plugins",
        "pipefusion,usp",
        "pipefusion.stages=2",
        "usp.ulysses=2",
        "usp.ring=1",
        "pipefusion.warmup=3",
        *SMALL,
    )
    command = f"ssh.command={hosts.ssh}"
    done = xdit(tmp_path, "--hostfile", "hosts", command, "ssh.env=MADE_UP", *words, "out=two.png", MADE_UP="a 'b' $c")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("two.png  ") and "step 3/3" in done.stderr and "warning" not in done.stderr
    assert xdit(tmp_path, *words, "out=one.png").returncode == 0
    assert pixels(tmp_path / "two.png") == pixels(tmp_path / "one.png")
    assert not hosts.left()
    plain = xdit(tmp_path, "--hosts", "alpha:4,beta:4", "--include", "beta", command, "--dry-run", *USP, *SMALL)
    assert plain.returncode == 0 and " -- beta " in plain.stdout and " -- alpha " not in plain.stdout
    few = xdit(tmp_path, "--hosts", "alpha:1", command, *USP, *SMALL)
    assert (few.returncode, few.stdout) == (
        2,
        "",
    ) and "2 processes need 2 slots, and all hosts together have 1" in few.stderr
    unset = xdit(tmp_path, "--hosts", "alpha,beta", command, "ssh.env=NOT_HERE", *USP, *SMALL)
    assert unset.returncode == 2 and "the variable NOT_HERE" in unset.stderr


@pytest.mark.slow
def test_hosts_that_share_no_disk(hosts: Cluster, tmp_path: Path) -> None:
    """Under `hosts.own` each host has a disk that nobody else sees, and the launcher a folder of its own."""
    own = hosts.own
    words = ("--hosts", "alpha:1,beta:1", f"ssh.command={hosts.ssh}", f"runs={own}/runs")
    done = xdit(tmp_path, *words, *USP, *SMALL, f"out={own}/x.png")
    assert done.returncode == 0 and done.stdout.startswith(f"{own}/x.png"), done.stderr
    there = subprocess.run([*hosts.ssh.split(), "alpha", f"ls {own}"], capture_output=True, text=True).stdout.split()
    assert "x.png" in there and not (own / "x.png").exists()
    faulty = (*words, "--plugins", "usp,faulty", "usp.ulysses=2", "faulty.how=raise", "faulty.rank=1", *SMALL)
    path = os.pathsep.join([str(FAULTY), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)
    failed = xdit(tmp_path, *faulty, f"out={own}/y.png", PYTHONPATH=path)
    assert failed.returncode == 1 and "rank 1 of 2 on beta failed" in failed.stderr and "beside it" not in failed.stderr
    (log,) = own.glob("runs/*/rank1.log")  # brought here
    assert "a number that is no number" in log.read_text() and str(log) in failed.stderr
    verified = xdit(tmp_path, "verify", *words, *USP, *SMALL)
    assert verified.returncode == 2 and "verify needs a folder that all hosts share" in verified.stderr, verified.stderr


@pytest.mark.slow
def test_verify_and_two_jobs_at_once_on_the_same_hosts(hosts: Cluster, tmp_path: Path) -> None:
    words = ["--hosts", "alpha:1,beta:1", f"ssh.command={hosts.ssh}", *USP, *SMALL]
    command = [sys.executable, "-P", "-m", "xdit_launcher.cli", *words]
    other = subprocess.Popen([*command, "out=other.png"], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    done = xdit(tmp_path, "verify", *words)
    assert (done.returncode, other.wait(60)) == (0, 0), done.stderr
    assert "equal: latents differ from those of the serial run" in done.stdout or "bit for bit" in done.stdout
    assert (tmp_path / "other.png").exists() and not hosts.left()


@pytest.mark.slow
def test_doctor(hosts: Cluster, tmp_path: Path) -> None:
    command = f"ssh.command={hosts.ssh}"
    done = xdit(tmp_path, "doctor", "--hosts", "alpha,beta", command, "--plugins", "usp", "model=emoji")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert (
        lines[0].split()[:3] == ["host", "python", "diffusers"]
        and lines[1].startswith("alpha")
        and lines[2].startswith("beta")
    )
    speeds = [line for line in lines if "bit/s" in line]
    assert len(speeds) == 2 and all(line.count("ms") == 1 for line in speeds)
    assert "alpha cannot resolve the name beta" in done.stdout and lines[-1] == "no problem that would stop a run."
    hosts.hosts.link("beta", "down")
    try:
        bad = xdit(tmp_path, "doctor", "--hosts", "alpha,beta,nowhere.invalid", f"{command} -o ConnectTimeout=3")
    finally:
        hosts.hosts.link("beta", "up")
    assert bad.returncode == 1
    problems = [line for line in bad.stdout.splitlines() if line.startswith("problem: ")]
    assert (
        len(problems) == 2
        and problems[0].startswith("problem: beta: ")
        and problems[1].startswith("problem: nowhere.invalid: ")
    )
    alone = xdit(tmp_path, "doctor")
    assert alone.returncode == 0 and alone.stdout.endswith("all is well.\n")


@pytest.mark.parametrize("kind", ["PyTorchJob", "JobSet"])
def test_manifests(say: Callable[..., Result], kind: str) -> None:
    words = (
        "--on",
        "k8s",
        "--nnodes",
        "2",
        "k8s.image=r/x:1",
        f"k8s.kind={kind}",
        "k8s.claim=models",
        "--plugins",
        "usp",
        "usp.ulysses=4",
    )
    done = say(*words, "--dry-run", "--trace", "model=emoji", "device=cuda", "a $(fox)")
    assert done.exit_code == 0, done.stderr
    found = yaml.safe_load(done.stdout)
    assert found["kind"] == kind and "&id" not in done.stdout
    if kind == "JobSet":
        (job,) = found["spec"]["replicatedJobs"]
        spec = job["template"]["spec"]
        assert (spec["parallelism"], spec["completions"], spec["completionMode"]) == (2, 2, "Indexed")
        pods = [spec["template"]["spec"]]
        where = ["--node-rank", "$(JOB_COMPLETION_INDEX)", "--rdzv", "xdit-workers-0-0.xdit:29500"]
    else:
        groups = found["spec"]["pytorchReplicaSpecs"]
        assert {name: group["replicas"] for name, group in groups.items()} == {"Master": 1, "Worker": 1}
        pods = [group["template"]["spec"] for group in groups.values()]
        where = ["--node-rank", "$(RANK)", "--rdzv", "$(MASTER_ADDR):29500"]
    for pod in pods:
        (container,) = pod["containers"]
        own = ["--plugins", "usp", "--trace", "usp.ulysses=4", "model=emoji", "device=cuda", "a $$(fox)"]
        assert container["command"] == ["xdit-launch", "--nnodes", "2", *where, *own]
        assert container["resources"]["limits"] == {"nvidia.com/gpu": 2}
        assert {v["name"] for v in pod["volumes"]} == {v["name"] for v in container["volumeMounts"]} == {"shm", "data"}


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (
            ("--dry-run", "k8s.image=a"),
            "this machine has no GPU and the pods may have some; choose where to run with device=cuda or",
        ),
        (("--dry-run", "k8s.image=a", "--config", "nothing.yaml"), "--config nothing.yaml cannot be read"),
        (("--dry-run",), "the pods need an image with xdit in it"),
        (("--dry-run", "k8s.image=a", "k8s.kind=Job"), "k8s.kind=Job is unknown; use PyTorchJob or JobSet."),
        (("--dry-run", "k8s.image=a", "k8s.name=My_Job"), "is not a valid Kubernetes name"),
        (
            ("--dry-run", "k8s.image=a", "device=cpu", "--nnodes", "2"),
            "cannot be divided evenly among 2 nodes",
        ),
        (("k8s.image=a",), "prints a manifest and starts nothing; add --dry-run"),
    ],
)
def test_manifests_that_cannot_be(say: Callable[..., Result], words: tuple[str, ...], part: str) -> None:
    done = say("--on", "k8s", *words, "model=emoji", "a")
    assert done.exit_code == 2 and part in done.stderr


def test_two_backends_of_one_name(say: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    info = tmp_path / "site" / "xdit_thief-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: xdit-thief\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[xdit.launchers]\nssh = xdit_thief\npaper = xdit_thief\n")
    other = tmp_path / "site" / "xdit_other-2.0.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: xdit-other\nVersion: 2.0\n")
    (other / "entry_points.txt").write_text("[xdit.launchers]\npaper = xdit_other\n")
    before = say("--hosts", "a", "--dry-run", "model=emoji", "a").output
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert say("--hosts", "a", "--dry-run", "model=emoji", "a").output == before  # what is ours stays ours
    said = say("--on", "paper", "--dry-run", "model=emoji", "a").stderr
    assert (
        "xdit-other 2.0 and xdit-thief 1.0 all have a backend paper" in said
        or "xdit-thief 1.0 and xdit-other 2.0" in said
    )


def test_the_dry_run_shows_the_command_of_the_user(say: Callable[..., Result]) -> None:
    words = ("--hosts", "a:2", "ssh.python=/opt/p", "--trace", "--plugins", "usp", "model=emoji", "device=cpu", "a fox")
    lines = say(*words, "--dry-run").stdout.splitlines()
    (command,) = (line.split(maxsplit=1)[1] for line in lines if line.startswith("command"))
    assert command == "xdit-launch --hosts a:2 ssh.python=/opt/p --plugins usp --trace model=emoji device=cpu 'a fox'"
    (by_hand,) = (line for line in lines if line.startswith("by hand"))
    assert "ssh.python" not in by_hand and "--trace" in by_hand


def test_a_backend_of_another_distribution(
    say: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What `xdit_launcher.backends.base` says is all that one needs."""
    info = tmp_path / "site" / "xdit_paper-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: xdit-paper\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[xdit.launchers]\npaper = xdit_paper\n")
    (tmp_path / "site" / "xdit_paper.py").write_text(
        "import json\nfrom dataclasses import asdict, dataclass\n"
        "@dataclass(frozen=True)\nclass Settings:\n    colour: str = 'white'\n    hosts: str = ''\n"
        "def devices(settings):\n    return 3\n"
        "def show(plan, settings, words):\n    return ['a sheet of ' + settings.colour]\n"
        "def start(plan, folder, settings):\n"
        "    (folder / 'told.json').write_text(json.dumps([plan.world, asdict(settings)]))\n    return 7\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    words = (
        "--on",
        "paper",
        "paper.colour=blue",
        "--hosts",
        "a",
        "--plugins",
        "dp",
        "model=emoji",
        "images=3",
        "a fox",
    )
    shown = say(*words, "--dry-run")
    assert "on paper      a sheet of blue" in shown.stdout, shown.stderr
    done = say(*words)
    assert done.exit_code == 7, done.stderr
    (told,) = tmp_path.glob("runs/*/told.json")
    assert json.loads(told.read_text())[1] == {"colour": "blue", "hosts": "a"}


CRDS = os.environ.get("XDIT_CRDS", "")


@pytest.mark.skipif(not CRDS, reason="XDIT_CRDS names no folder with the CRDs of JobSet and PyTorchJob (YAML)")
@pytest.mark.parametrize("kind", ["PyTorchJob", "JobSet"])
def test_manifests_against_the_published_schema(say: Callable[..., Result], kind: str) -> None:
    """Types as the schema says, and no field that it does not know (a cluster would drop it)."""
    words = (
        "--on",
        "k8s",
        "--nnodes",
        "2",
        "k8s.image=r/x:1",
        f"k8s.kind={kind}",
        "k8s.claim=m",
        "k8s.namespace=n",
        "k8s.gpus=8",
    )
    made = yaml.safe_load(
        say(*words, "--dry-run", "--plugins", "usp", "usp.ulysses=4", "model=emoji", "device=cuda", "a").stdout
    )
    check_schema(made, CRDS)
