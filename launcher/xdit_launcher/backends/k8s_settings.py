"""What pods look like, for all manifests. Without torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from xdit_core.errors import UsageError
from xdit_launcher.backends.local import Node
from xdit_launcher.cluster import host_facts

if TYPE_CHECKING:
    from xdit_core.plan import Plan

RUNS = ("PyTorchJob", "JobSet")
SERVERS = ("LeaderWorkerSet", "RayService")
FRONT = "xdit_front"  # resource of Ray that only the pod of the server has
NAME = re.compile(r"[a-z]([a-z0-9-]{0,50}[a-z0-9])?")


@dataclass(frozen=True)
class Settings:
    """What the pods of the job look like."""

    image: str = field(default="", metadata={"help": "container image with xdit in it"})
    kind: str = field(
        default="",
        metadata={
            "help": "PyTorchJob or JobSet; of serve LeaderWorkerSet or RayService; default: what suits, the first"
        },
    )
    nnodes: int = field(default=1, metadata={"help": "pods"})
    gpus: int | None = field(
        default=None, metadata={"help": "GPUs of each pod; default: one for each of its processes"}
    )
    name: str = field(default="xdit", metadata={"help": "name of the job"})
    namespace: str = field(default="", metadata={"help": "namespace of the job; default: that of kubectl"})
    claim: str = field(default="", metadata={"help": "a PersistentVolumeClaim with models and results"})
    mount: str = field(default="/data", metadata={"help": "where the claim is mounted, and the pods work"})
    secret: str = field(default="", metadata={"help": "of serve: a Secret whose item keys has the keys of clients"})
    port: int = field(default=29500, metadata={"help": "where the ranks meet"})


def checked(plan: Plan, settings: Settings, words: Sequence[str], kinds: Sequence[str]) -> Settings:
    """The settings with the GPUs of a pod and the kind filled in.

    Args:
        words: of the command line.
        kinds: that are possible; the first is the default.

    Raises:
        UsageError: a setting is missing or wrong.
    """
    if "--config" in words:
        raise UsageError(
            "the pods do not have your config file; write its settings on the command line instead of --config."
        )
    if not settings.image:
        raise UsageError("the pods need an image with xdit in it; give k8s.image=REGISTRY/NAME:TAG.")
    kind = settings.kind or kinds[0]
    if kind not in kinds:
        raise UsageError(f"k8s.kind={kind} is unknown; use {' or '.join(kinds)}.")
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
    gpus = (0 if plan.device == "cpu" else each) if settings.gpus is None else settings.gpus
    return replace(settings, kind=kind, gpus=gpus)


def metadata(settings: Settings) -> dict[str, str]:
    """Name and namespace."""
    return {"name": settings.name, **({"namespace": settings.namespace} if settings.namespace else {})}


def escaped(words: Sequence[str]) -> list[str]:
    """The words with ``$(`` escaped, because Kubernetes replaces ``$(NAME)`` in commands."""
    return [word.replace("$(", "$$(") for word in words]
