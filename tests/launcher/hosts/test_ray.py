"""A real Ray on this machine."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from helpers.launcher import FAULTY
from helpers.launcher.served import KEYS, Served, ended, wait_for
from helpers.launcher.typed import SMALL, USP, lose_a_rank, xdit
from xdit_launcher import Gang


@pytest.fixture(scope="module")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    pytest.importorskip("ray")
    ray = shutil.which("ray", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert ray
    path = os.pathsep.join([str(FAULTY), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)
    start = [
        ray,
        "start",
        "--head",
        "--num-cpus=2",
        '--resources={"xdit_front": 1}',
        "--port=0",
        "--include-dashboard=false",
        "--object-store-memory=100000000",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", path)
        subprocess.run(start, check=True, capture_output=True, cwd=tmp_path_factory.mktemp("r", numbered=True))
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


@pytest.mark.slow
def test_a_gang_of_actors(ray_cluster: None, tmp_path: Path) -> None:
    """It answers requests; a killed rank ends it with the report."""
    settings = {"model": "emoji", "device": "cpu", "threads": 1, "usp.ulysses": 2, "usp.ring": 1}
    with Gang(["usp"], {**settings, "runs": str(tmp_path / "runs")}, on="ray") as gang:
        first, second = (gang.generate("red heart", steps=2, seed=5) for _ in range(2))
        assert first.pictures == second.pictures
        lose_a_rank(gang, tmp_path, r"rank 1 of 2 on .* failed at(.|\n)*killed by signal 9")


def replicas() -> list[psutil.Process]:
    """The processes of the replicas of Ray Serve."""
    found = psutil.process_iter(["name"])
    return [process for process in found if process.info["name"].startswith("ray::ServeReplica")]


@pytest.mark.slow
def test_replicas_come_with_jobs_and_every_job_ends_though_one_is_killed(ray_cluster: None, tmp_path: Path) -> None:
    """Jobs that wait bring a second replica, one of both is killed, later one goes, and a signal replaces the other."""
    pytest.importorskip("ray.serve")
    words = (
        "--on",
        "ray",
        "--replicas",
        "1..2",
        *SMALL[:2],
        "steps=80",
        "threads=1",
        "serve.idle=2",
        "serve.steps=9000",
    )
    served = Served(tmp_path / "work", *words).ready()
    try:
        with served.http() as client:

            def draw(**more: int) -> str:
                return str(client.post("/v1/jobs", json={"prompt": "rocket", "seed": 5, **more}).json()["id"])

            def loaded(count: int) -> bool:
                return f"xdit_gangs_loaded {count}\n" in client.get("/metrics").text and len(replicas()) == count

            def step(id: str) -> int:
                return (client.get(f"/v1/jobs/{id}").json()["progress"] or {}).get("step") or 0

            long = [draw(steps=9000) for _ in range(2)]
            wait_for(lambda: loaded(2) and all(map(step, long)), served.log)
            ids = [draw() for _ in range(4)]
            for id in long:
                client.delete(f"/v1/jobs/{id}")
            wait_for(lambda: all(map(step, ids[:2])), served.log)
            replicas()[0].kill()
            jobs = [ended(client, id) for id in ids]
            assert [job["status"] for job in jobs] == ["done"] * 4, served.log()
            assert len({client.get(job["results"][0]["url"]).content for job in jobs}) == 1
            assert served.events("job waits again")
            assert [ended(client, id)["status"] for id in long] == ["cancelled"] * 2
            wait_for(lambda: loaded(1), served.log)
            (first,) = replicas()
            served.process.send_signal(signal.SIGUSR1)
            wait_for(lambda: loaded(1) and replicas() != [first], served.log)
            assert ended(client, draw())["status"] == "done"
        assert served.end() == 0
    finally:
        served.close()


@pytest.mark.slow
def test_the_server_as_an_application_of_ray_serve(ray_cluster: None, tmp_path: Path) -> None:
    """As KubeRay deploys it: gangs and server are actors."""
    httpx, serve = pytest.importorskip("httpx"), pytest.importorskip("ray.serve")
    import ray

    from xdit_launcher.serve.gangs.ray_app import build

    (tmp_path / "keys").write_text(f"{KEYS[0]}\n")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = [*SMALL[:2], "steps=3", "threads=1"]
    options = {"data": str(tmp_path / "data"), "keys": str(tmp_path / "keys"), "port": port, "replicas": "1..2"}
    ray.init(address="auto", logging_level=logging.ERROR, log_to_driver=False)
    try:
        serve.start(proxy_location="Disabled")
        serve.run(build({"words": words, **options}), name="xdit", route_prefix=None)
        client = httpx.Client(base_url=f"http://127.0.0.1:{port}", headers={"Authorization": f"Bearer {KEYS[0]}"})
        with client:
            wait_for(lambda: client.get("/ready").status_code == 200)
            id = client.post("/v1/jobs", json={"prompt": "rocket"}).json()["id"]
            job = ended(client, id)
            assert job["status"] == "done" and client.get(job["results"][0]["url"]).content.startswith(b"\x89PNG")
        serve.delete("xdit")
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"http://127.0.0.1:{port}/health")
    finally:
        ray.shutdown()
