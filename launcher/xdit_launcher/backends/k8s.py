"""The backend ``k8s``: with ``--dry-run`` it prints a manifest for ``kubectl apply -f -``, a PyTorchJob (Kubeflow) or a
JobSet.

Every pod runs the same command with ``--nnodes``, ``--node-rank`` and ``--rdzv`` from variables that the operator sets.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xdit_core.errors import UsageError
from xdit_launcher.backends import k8s_service
from xdit_launcher.backends.k8s_settings import RUNS, Settings, checked, escaped, metadata

if TYPE_CHECKING:
    from xdit_core.plan import Plan


def devices(settings: Settings) -> int | None:
    """How many processes suit the pods, None for as many as suit this machine."""
    return settings.gpus * settings.nnodes if settings.gpus else None


def document(plan: Plan, settings: Settings, words: Sequence[str]) -> str:
    """The manifest as YAML.

    Raises:
        UsageError: a setting is missing or wrong.
    """
    import yaml  # type: ignore[import-untyped]

    # through JSON, so that no object occurs twice and YAML needs no aliases
    data = json.loads(json.dumps(manifest(plan, settings, words)))
    text: str = yaml.safe_dump(data, sort_keys=False, width=120)
    return text


def manifest(plan: Plan, settings: Settings, words: Sequence[str]) -> dict[str, Any]:
    """The manifest as data, see `document`."""
    settings = checked(plan, settings, words, RUNS)
    job = pytorchjob(settings, words) if settings.kind == RUNS[0] else jobset(settings, words)
    return {"apiVersion": job.pop("apiVersion"), "kind": settings.kind, "metadata": metadata(settings), **job}


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


def service(plan: Plan, settings: Settings, words: Sequence[str], replicas: tuple[int, int], data: str) -> str:
    """The manifests of a server as YAML, see `xdit_launcher.backends.k8s_service`."""
    import yaml

    documents = k8s_service.manifests(plan, settings, words, replicas, data)
    text: str = yaml.safe_dump_all(json.loads(json.dumps(documents)), sort_keys=False, width=120)
    return text


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
