"""The backend ``k8s``: with ``--dry-run`` it prints a manifest for ``kubectl apply -f -``, a PyTorchJob (Kubeflow) or a
JobSet.

Every pod runs the same command with ``--nnodes``, ``--node-rank`` and ``--rdzv`` from variables that the operator sets.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xdit_core.errors import UsageError
from xdit_launcher.backends.local import Node
from xdit_launcher.cluster import host_facts

if TYPE_CHECKING:
    from xdit_core.plan import Plan

KINDS = ("PyTorchJob", "JobSet")
NAME = re.compile(r"[a-z]([a-z0-9-]{0,50}[a-z0-9])?")


@dataclass(frozen=True)
class Settings:
    """What the pods of the job look like."""

    image: str = field(default="", metadata={"help": "container image with xdit in it"})
    kind: str = field(default="PyTorchJob", metadata={"help": "PyTorchJob or JobSet"})
    nnodes: int = field(default=1, metadata={"help": "pods"})
    gpus: int | None = field(
        default=None, metadata={"help": "GPUs of each pod; default: one for each of its processes"}
    )
    name: str = field(default="xdit", metadata={"help": "name of the job"})
    namespace: str = field(default="", metadata={"help": "namespace of the job; default: that of kubectl"})
    claim: str = field(default="", metadata={"help": "a PersistentVolumeClaim with models and results"})
    mount: str = field(default="/data", metadata={"help": "where the claim is mounted, and the pods work"})
    port: int = field(default=29500, metadata={"help": "where the ranks meet"})


def devices(settings: Settings) -> int | None:
    """How many processes suit the pods, None for as many as suit this machine."""
    return settings.gpus * settings.nnodes if settings.gpus else None


def document(plan: Plan, settings: Settings, words: Sequence[str]) -> str:
    """The manifest as YAML.

    Raises:
        UsageError: a setting is missing or wrong.
    """
    import yaml  # type: ignore[import-untyped]

    if "--config" in words:
        raise UsageError(
            "the pods do not have your config file; write its settings on the command line instead of --config."
        )
    # through JSON, so that no object occurs twice and YAML needs no aliases
    data = json.loads(json.dumps(manifest(plan, settings, words)))
    text: str = yaml.safe_dump(data, sort_keys=False, width=120)
    return text


def manifest(plan: Plan, settings: Settings, words: Sequence[str]) -> dict[str, Any]:
    """The manifest as data, see `document`."""
    if not settings.image:
        raise UsageError("the pods need an image with xdit in it; give k8s.image=REGISTRY/NAME:TAG.")
    if settings.kind not in KINDS:
        raise UsageError(f"k8s.kind={settings.kind} is unknown; use {' or '.join(KINDS)}.")
    if not NAME.fullmatch(settings.name):
        raise UsageError(
            f"k8s.name={settings.name} is not a valid Kubernetes name; use lower-case letters, digits and dashes, "
            "52 at most."
        )
    if settings.nnodes < 1 or not 0 < settings.port < 65536:
        raise UsageError("k8s.nnodes= must be 1 or more, and k8s.port= from 1 to 65535; correct them.")
    if problem := host_facts.device_problem(plan, True, "the pods may have some"):
        raise UsageError(problem)
    each = len(Node(0, settings.nnodes).ranks(plan.world))
    if settings.gpus is None:
        settings = replace(settings, gpus=0 if plan.device == "cpu" else each)
    meta: dict[str, Any] = {"name": settings.name, **({"namespace": settings.namespace} if settings.namespace else {})}
    job = pytorchjob(settings, words) if settings.kind == KINDS[0] else jobset(settings, words)
    return {"apiVersion": job.pop("apiVersion"), "kind": settings.kind, "metadata": meta, **job}


def pod(settings: Settings, words: Sequence[str], container: str, index: str, host: str) -> dict[str, Any]:
    """The specification of one pod.

    Args:
        words: of the command line.
        container: its name.
        index: a word that Kubernetes replaces by the number of the pod.
        host: a word that Kubernetes replaces by the address of the first pod.
    """
    where = ["--nnodes", str(settings.nnodes), "--node-rank", index, "--rdzv", f"{host}:{settings.port}"]
    spec: dict[str, Any] = {
        "name": container,
        "image": settings.image,
        "command": ["xdit-launch", *(where if settings.nnodes > 1 else []), *escaped(words)],
        "ports": [{"name": "rdzv", "containerPort": settings.port}],
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
    }
    if settings.gpus:
        spec["resources"] = {"limits": {"nvidia.com/gpu": settings.gpus}}
    volumes: list[Mapping[str, Any]] = [
        {"name": "shm", "emptyDir": {"medium": "Memory"}}
    ]  # NCCL needs more than a container's 64 MB
    if settings.claim:
        spec |= {"workingDir": settings.mount}
        spec["volumeMounts"].append({"name": "data", "mountPath": settings.mount})
        volumes.append({"name": "data", "persistentVolumeClaim": {"claimName": settings.claim}})
    return {"restartPolicy": "Never", "containers": [spec], "volumes": volumes}


def escaped(words: Sequence[str]) -> list[str]:
    """The words with ``$(`` escaped, because Kubernetes replaces ``$(NAME)`` in commands."""
    return [word.replace("$(", "$$(") for word in words]


def pytorchjob(settings: Settings, words: Sequence[str]) -> dict[str, Any]:
    """A PyTorchJob of Kubeflow's training operator, which sets RANK, MASTER_ADDR and MASTER_PORT of each pod."""
    spec = pod(settings, words, "pytorch", "$(RANK)", "$(MASTER_ADDR)")
    spec = {k: v for k, v in spec.items() if k != "restartPolicy"}

    def replicas(count: int) -> dict[str, Any]:
        port = {"name": "pytorchjob-port", "containerPort": settings.port}
        container = {**spec["containers"][0], "ports": [port]}
        return {"replicas": count, "restartPolicy": "Never", "template": {"spec": {**spec, "containers": [container]}}}

    groups = {"Master": replicas(1), **({"Worker": replicas(settings.nnodes - 1)} if settings.nnodes > 1 else {})}
    policy = {"cleanPodPolicy": "Running", "backoffLimit": 0}
    return {"apiVersion": "kubeflow.org/v1", "spec": {"runPolicy": policy, "pytorchReplicaSpecs": groups}}


def jobset(settings: Settings, words: Sequence[str]) -> dict[str, Any]:
    """A JobSet of one indexed job; its pods are known by name to each other."""
    spec = pod(settings, words, "xdit", "$(JOB_COMPLETION_INDEX)", f"{settings.name}-workers-0-0.{settings.name}")
    job = {
        "parallelism": settings.nnodes,
        "completions": settings.nnodes,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "template": {"spec": spec},
    }
    replicated = {"name": "workers", "replicas": 1, "template": {"spec": job}}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "spec": {
            "failurePolicy": {"maxRestarts": 0},
            "network": {"enableDNSHostnames": True},
            "replicatedJobs": [replicated],
        },
    }


def check(plan: Plan, settings: Settings) -> None:
    """Refuse to start anything, since this backend only prints a manifest.

    Raises:
        UsageError: always.
    """
    raise UsageError(
        "the backend k8s prints a manifest and starts nothing; add --dry-run and pass its output to kubectl apply -f -."
    )


def start(plan: Plan, folder: Path, settings: Settings) -> int:
    """See `check`."""
    check(plan, settings)
    return 1
