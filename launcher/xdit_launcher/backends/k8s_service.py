"""Manifests of a server: a LeaderWorkerSet has one gang over several pods, a RayService as many gangs as the queue
needs. In both, Ray connects the pods, and probes ask the server itself. Without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from xdit_core.errors import UsageError
from xdit_launcher.backends.k8s_settings import FRONT, SERVERS, Settings, checked, escaped, metadata

if TYPE_CHECKING:
    from xdit_core.plan import Plan

PORT = 8080  # of the server; Ray Serve has 8000
RAY_PORT = 6379
KEYS = "/run/secrets/xdit"
LOADING = 3600  # seconds that a model may take to load
GRACE = 330  # seconds for the running jobs when a pod ends
BUILDER = "xdit_launcher.serve.gangs.ray_app:build"

# {nodes} Ray nodes must have joined before the server counts devices
LEADER = (
    "ray start --head --port={port} && until python -c \"import ray; ray.init('auto', logging_level=40); "
    'raise SystemExit(sum(node[\'Alive\'] for node in ray.nodes()) < {nodes})"; do sleep 2; done && exec "$0" "$@"'
)
WORKER = 'until ray start --address="$LWS_LEADER_ADDRESS:{port}" --block; do sleep 2; done'


def manifests(
    plan: Plan, settings: Settings, words: Sequence[str], replicas: tuple[int, int], data: str
) -> list[dict[str, Any]]:
    """The manifest of the server, and that of its Service.

    Args:
        words: that say what is served, as on the command line.
        replicas: the least and the most number of gangs.
        data: folder of jobs and results, relative to the mounted claim.

    Raises:
        UsageError: a setting is missing or wrong.
    """
    settings = checked(plan, settings, words, SERVERS if replicas == (1, 1) else SERVERS[::-1])
    if not settings.secret:
        raise UsageError("pods are reached by others, so the server needs keys; give k8s.secret=NAME of a Secret.")
    if not settings.claim:
        raise UsageError("jobs and results must outlive a pod; give k8s.claim=NAME of a PersistentVolumeClaim.")
    folder = f"{settings.mount.rstrip('/')}/{data}" if not data.startswith("/") else data
    if settings.kind == "LeaderWorkerSet":
        if replicas != (1, 1):
            raise UsageError("a LeaderWorkerSet has one gang; leave out --replicas, or use k8s.kind=RayService.")
        server = leader_worker_set(settings, words, folder)
        selector = {"leaderworkerset.sigs.k8s.io/name": settings.name, "leaderworkerset.sigs.k8s.io/worker-index": "0"}
    else:
        server = ray_service(settings, words, replicas, folder)
        selector = {"app": settings.name, "ray.io/group": "front"}
    ports = [{"name": "http", "port": PORT, "targetPort": PORT}]
    access = {"apiVersion": "v1", "kind": "Service", "metadata": metadata(settings)}
    return [server, {**access, "spec": {"selector": selector, "ports": ports}}]


def pod(settings: Settings, name: str, gpus: bool, command: Sequence[str] = (), server: bool = False) -> dict[str, Any]:
    """The specification of a pod.

    Args:
        name: of its container.
        gpus: it has those of the settings.
        server: the server answers in it.
    """
    container: dict[str, Any] = {"name": name, "image": settings.image, "workingDir": settings.mount}
    if command:
        container["command"] = [*command]
    mounts = [{"name": "shm", "mountPath": "/dev/shm"}, {"name": "data", "mountPath": settings.mount}]
    volumes: list[Mapping[str, Any]] = [
        {"name": "shm", "emptyDir": {"medium": "Memory"}},
        {"name": "data", "persistentVolumeClaim": {"claimName": settings.claim}},
    ]
    if gpus and settings.gpus:
        container["resources"] = {"limits": {"nvidia.com/gpu": settings.gpus}}
    if server:
        mounts.append({"name": "keys", "mountPath": KEYS, "readOnly": True})  # type: ignore[dict-item]
        volumes.append({"name": "keys", "secret": {"secretName": settings.secret}})
        alive = {"httpGet": {"path": "/health", "port": PORT}, "timeoutSeconds": 5}
        ready = {"httpGet": {"path": "/ready", "port": PORT}, "timeoutSeconds": 5}
        container |= {
            "ports": [{"name": "http", "containerPort": PORT}],
            "startupProbe": {**alive, "periodSeconds": 10, "failureThreshold": LOADING // 10},
            "livenessProbe": {**alive, "periodSeconds": 10, "failureThreshold": 6},
            "readinessProbe": {**ready, "periodSeconds": 5, "failureThreshold": 1},
        }
    container["volumeMounts"] = mounts
    grace = {"terminationGracePeriodSeconds": GRACE} if server else {}
    return {**grace, "containers": [container], "volumes": volumes}


def leader_worker_set(settings: Settings, words: Sequence[str], folder: str) -> dict[str, Any]:
    """One gang over the pods of a group: the leader has the head of Ray and the server, all have ranks."""
    options = ["--host", "0.0.0.0", "--port", str(PORT), "--data", folder, "--keys", f"{KEYS}/keys", "--on", "ray"]
    command = ["sh", "-c", LEADER.format(port=RAY_PORT, nodes=settings.nnodes), "xdit-launch", "serve"]
    leader = pod(settings, "leader", True, [*command, *options, *escaped(words)], server=True)
    worker = pod(settings, "worker", True, ["sh", "-c", WORKER.format(port=RAY_PORT)])
    template = {
        "size": settings.nnodes,
        "restartPolicy": "RecreateGroupOnPodRestart",
        "leaderTemplate": {"metadata": {"labels": {"app": settings.name}}, "spec": leader},
        "workerTemplate": {"metadata": {"labels": {"app": settings.name}}, "spec": worker},
    }
    return {
        "apiVersion": "leaderworkerset.x-k8s.io/v1",
        "kind": "LeaderWorkerSet",
        "metadata": metadata(settings),
        "spec": {"replicas": 1, "leaderWorkerTemplate": template},
    }


def ray_service(settings: Settings, words: Sequence[str], replicas: tuple[int, int], folder: str) -> dict[str, Any]:
    """Gangs as replicas of Ray Serve, and the server as an actor in a pod of its own, which the probes ask.

    The pod of the head answers no probe of ours: KubeRay deploys the application once that pod is ready.
    """
    import yaml  # type: ignore[import-untyped]

    least, most = replicas
    plugins = words[1] if words[:1] == ["--plugins"] else ""
    loras = {"loras": words[-1]} if words[-2:-1] == ["--loras"] else {}
    words = words[:-2] if loras else words
    arguments = {
        "plugins": plugins,
        "words": [*words[2 if plugins else 0 :]],
        "replicas": f"{least}..{most}",
        "port": PORT,
        "data": folder,
        "keys": f"{KEYS}/keys",
        **loras,
    }
    application = {"name": settings.name, "import_path": BUILDER, "route_prefix": None, "args": arguments}

    def group(name: str, least: int, most: int, start: Mapping[str, str], spec: Mapping[str, Any]) -> dict[str, Any]:
        template = {"metadata": {"labels": {"app": settings.name}}, "spec": spec}
        counts = {"replicas": least, "minReplicas": least, "maxReplicas": most}
        return {"groupName": name, **counts, "rayStartParams": {**start}, "template": template}

    nothing = {"num-cpus": "0", "num-gpus": "0"}
    resource = {"resources": json.dumps(json.dumps({FRONT: 1}))}
    head = {
        "rayStartParams": {**nothing, "dashboard-host": "0.0.0.0"},
        "template": {"spec": pod(settings, "ray-head", False)},
    }
    cluster = {
        "enableInTreeAutoscaling": least < most,
        "headGroupSpec": head,
        "workerGroupSpecs": [
            group("front", 1, 1, {**nothing, **resource}, pod(settings, "front", False, server=True)),
            group("gangs", least * settings.nnodes, most * settings.nnodes, {}, pod(settings, "gangs", True)),
        ],
    }
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": metadata(settings),
        "spec": {
            "upgradeStrategy": {"type": "None"},  # two clusters would share the folder of jobs
            "serveConfigV2": yaml.safe_dump({"applications": [application]}, sort_keys=False, width=1000),
            "rayClusterConfig": cluster,
        },
    }
