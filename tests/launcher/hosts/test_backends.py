"""Real clusters: hosts over ssh, Slurm and Ray on this machine; manifests; and a backend of somebody else's."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from click.testing import Result
from PIL import Image

from helpers.launcher import FAULTY, slurm_cluster
from helpers.launcher.cluster import Cluster, cluster, missing
from helpers.launcher.slurm_cluster import slurm
from xdit_core import RequestCancelled
from xdit_core.testing.beats import step_of
from xdit_launcher import Gang
from xdit_launcher.gang.job import GangEnded

USP = ("--plugins", "usp", "usp.ulysses=2", "usp.ring=1")
SMALL = ("model=emoji", "device=cpu", "steps=3", "red heart")


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if missing():
        pytest.skip(missing())
    with cluster(tmp_path_factory.mktemp("hosts"), [FAULTY]) as made:
        yield made


@pytest.fixture(scope="module")
def slurm_env(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    if slurm_cluster.missing():
        pytest.skip(slurm_cluster.missing())
    with slurm(tmp_path_factory.mktemp("slurm")) as env:
        yield env


def xdit(
    folder: Path, *words: str, before: tuple[str, ...] = (), env: dict[str, str] | None = None, **more: str
) -> Any:
    """The command as a user types it."""
    command = [*before, sys.executable, "-P", "-m", "xdit_launcher.cli", *words]
    return subprocess.run(
        command, cwd=folder, env={**(env or os.environ), **more}, capture_output=True, text=True, timeout=120
    )


def pixels(path: Path) -> bytes:
    return Image.open(path).tobytes()


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
        job = gang.submit("red heart", steps=4000)
        next(event for event in job.events(timeout=60) if event.kind == "step")
        worker = next(p for p in psutil.process_iter(["cmdline", "environ"]) if runs_rank(p, 1, tmp_path))
        worker.kill()
        with pytest.raises(GangEnded, match=r"rank 1 of 2 on beta failed at"):
            job.result(timeout=60)
    with Gang(["usp"], settings) as here:
        assert here.generate("red heart", steps=3).pictures == first.pictures
    assert not hosts.left()


def runs_rank(process: psutil.Process, rank: int, folder: Path) -> bool:
    """Whether a process is this rank of a run whose folder is in ``folder``."""
    words, environ = process.info["cmdline"] or [], process.info["environ"] or {}
    return str(folder) in " ".join(words) and environ.get("RANK") == str(rank) and "xdit_core.worker" in words


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
    plain = xdit(tmp_path, "--hosts", "alpha:4,beta:4", "--include", "beta", command, *USP, *SMALL)
    assert plain.returncode == 0 and "spans" not in plain.stderr
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


@pytest.fixture
def ray_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray = shutil.which("ray", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert ray
    path = os.pathsep.join([str(FAULTY), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)
    monkeypatch.setenv("PYTHONPATH", path)
    folder = tmp_path_factory.mktemp("r", numbered=True)
    start = [
        ray,
        "start",
        "--head",
        "--num-cpus=2",
        "--port=0",
        "--include-dashboard=false",
        "--object-store-memory=100000000",
    ]
    subprocess.run(start, check=True, capture_output=True, cwd=folder)
    yield
    subprocess.run([ray, "stop", "--force"], capture_output=True)


@pytest.mark.slow
def test_ray(ray_cluster: None, tmp_path: Path) -> None:
    done = xdit(tmp_path, "--on", "ray", *USP, *SMALL)
    assert done.returncode == 0 and done.stdout.startswith("out.png  "), done.stderr
    assert "warning" not in done.stderr  # both actors are on one machine
    words = ("--on", "ray", "--plugins", "usp,faulty", "usp.ulysses=2", "faulty.rank=1", *SMALL)
    failed = xdit(tmp_path, *words, "faulty.how=kill")
    assert failed.returncode == 137 and "rank 1 of 2 on " in failed.stderr and "killed by signal 9" in failed.stderr
    many = xdit(tmp_path, "--on", "ray", "--plugins", "usp", "usp.ulysses=4", "usp.ring=1", *SMALL)
    assert (
        many.returncode == 2
        and "4 processes need 4 CPUs and the Ray cluster has 2 on 1 node; lower the degrees" in many.stderr
    )
    spread = xdit(tmp_path, "--on", "ray", "ray.strategy=STRICT_SPREAD", "ray.wait=3", *USP, *SMALL)
    assert spread.returncode == 2 and "Ray found no place for 2 actors with STRICT_SPREAD within 3 s" in spread.stderr
    shown = xdit(tmp_path, "--on", "ray", "--dry-run", *USP, *SMALL)
    assert "2 actors with 1 CPU each, placed with PACK" in shown.stdout
    nothing = xdit(tmp_path, "--on", "ray", "ray.cpus=0", *USP, *SMALL)
    assert nothing.returncode == 2 and "ray.cpus=0 is too small" in nothing.stderr


def test_no_ray_cluster(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    done = xdit(tmp_path, "--on", "ray", "ray.address=127.0.0.1:1", *USP, *SMALL)
    assert done.returncode == 2 and "no Ray cluster answers at ray.address=127.0.0.1:1" in done.stderr


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
    jsonschema = pytest.importorskip("jsonschema")
    known = [yaml.safe_load(path.read_text()) for path in Path(CRDS).glob("*.yaml")]
    (crd,) = [found for found in known if found["spec"]["names"]["kind"] == kind]
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
    (version,) = [v for v in crd["spec"]["versions"] if f"{crd['spec']['group']}/{v['name']}" == made["apiVersion"]]
    schema = version["schema"]["openAPIV3Schema"]

    def strict(part: Any) -> None:
        if isinstance(part, dict):
            if "properties" in part and isinstance(part["properties"], dict) and part.get("type") == "object":
                part.setdefault("additionalProperties", bool(part.get("x-kubernetes-preserve-unknown-fields")))
            for value in part.values():
                strict(value)
        elif isinstance(part, list):
            for value in part:
                strict(value)

    strict(schema["properties"]["spec"])
    jsonschema.validate(made, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**made, "spec": {**made["spec"], "unknown": 1}}, schema)
