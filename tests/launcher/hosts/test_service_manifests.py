"""Manifests of a server for Kubernetes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from click.testing import Result

from helpers.schemas import check_schema

WORDS = ("serve", "--on", "k8s", "k8s.image=r/x:1", "k8s.secret=keys", "k8s.claim=data", "--nnodes", "2")
PLAN = ("--plugins", "usp", "usp.ulysses=4", "model=emoji", "device=cuda", "serve.queue=7")
LORAS = ("--loras", "loras.txt")
CRDS = os.environ.get("XDIT_CRDS", "")


def made(say: Callable[..., Result], *words: str) -> list[dict[str, Any]]:
    done = say(*WORDS, *words, *PLAN)
    assert done.exit_code == 0 and "&id" not in done.stdout, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def probes(pod: dict[str, Any]) -> dict[str, str]:
    (container,) = pod["containers"]
    assert {v["name"] for v in pod["volumes"]} == {v["name"] for v in container["volumeMounts"]}
    return {name: probe["httpGet"]["path"] for name, probe in container.items() if name.endswith("Probe")}


PROBES = {"startupProbe": "/health", "livenessProbe": "/health", "readinessProbe": "/ready"}


def test_one_gang_over_several_pods(say: Callable[..., Result]) -> None:
    workers, service = made(say, *LORAS)
    template = workers["spec"]["leaderWorkerTemplate"]
    assert (workers["kind"], workers["spec"]["replicas"], template["size"]) == ("LeaderWorkerSet", 1, 2)
    leader, worker = (template[f"{name}Template"]["spec"] for name in ("leader", "worker"))
    assert probes(leader) == PROBES and probes(worker) == {}
    command = leader["containers"][0]["command"]
    assert command[:2] == ["sh", "-c"] and command[3:5] == ["xdit-launch", "serve"]
    assert command[-len(PLAN) - 2 :] == [*PLAN, *LORAS]
    assert "sum(node['Alive'] for node in ray.nodes()) < 2" in command[2]
    assert command[command.index("--on") :][:2] == ["--on", "ray"] and "/data/serve-data" in command
    assert all(pod["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": 2} for pod in (leader, worker))
    (port,) = service["spec"]["ports"]
    assert port["port"] == 8080 == leader["containers"][0]["ports"][0]["containerPort"]


def test_many_gangs(say: Callable[..., Result]) -> None:
    rays, service = made(say, "--replicas", "1..3", *LORAS)
    cluster = rays["spec"]["rayClusterConfig"]
    front, gangs = cluster["workerGroupSpecs"]
    assert cluster["enableInTreeAutoscaling"] and rays["kind"] == "RayService"
    assert (gangs["minReplicas"], gangs["maxReplicas"], front["maxReplicas"]) == (2, 6, 1)
    assert probes(front["template"]["spec"]) == PROBES and probes(gangs["template"]["spec"]) == {}
    assert json.loads(json.loads(front["rayStartParams"]["resources"])) == {"xdit_front": 1}
    assert probes(cluster["headGroupSpec"]["template"]["spec"]) == {}
    (application,) = yaml.safe_load(rays["spec"]["serveConfigV2"])["applications"]
    arguments = application["args"]
    assert arguments["plugins"] == "usp" and arguments["words"] == [*PLAN[2:]] and arguments["replicas"] == "1..3"
    assert arguments["loras"] == "loras.txt"
    labels = {**front["template"]["metadata"]["labels"], "ray.io/group": front["groupName"]}
    assert service["spec"]["selector"] == labels


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("k8s.secret=",), "the server needs keys; give k8s.secret=NAME"),
        (("k8s.claim=",), "give k8s.claim=NAME of a PersistentVolumeClaim"),
        (("--replicas", "2", "k8s.kind=LeaderWorkerSet"), "a LeaderWorkerSet has one gang"),
        (("k8s.kind=JobSet",), "k8s.kind=JobSet is unknown; use LeaderWorkerSet or RayService"),
    ],
)
def test_servers_that_cannot_be(say: Callable[..., Result], words: tuple[str, ...], part: str) -> None:
    replaced = {word.partition("=")[0] for word in words if "=" in word}
    done = say(*(word for word in WORDS if word.partition("=")[0] not in replaced), *words, *PLAN)
    assert done.exit_code == 2 and part in done.stderr


@pytest.mark.skipif(not CRDS, reason="XDIT_CRDS names no folder with the CRDs of LeaderWorkerSet and RayService (YAML)")
@pytest.mark.parametrize("words", [("k8s.namespace=n",), ("--replicas", "1..4", "k8s.gpus=8")])
def test_servers_against_the_published_schema(say: Callable[..., Result], words: tuple[str, ...]) -> None:
    check_schema(made(say, *words)[0], CRDS)
