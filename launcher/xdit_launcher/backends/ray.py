"""The backend ``ray``: reserve a placement group on a Ray cluster with one actor, which holds an
agent, for each rank."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xdit_core.errors import UsageError
from xdit_launcher.backends.supervise import supervise
from xdit_launcher.cluster import host_facts
from xdit_launcher.cluster.fleet import Fleet
from xdit_launcher.cluster.hosts import Host
from xdit_launcher.cluster.protocol import Deliver
from xdit_launcher.cluster.run import StartedOnHosts, started_on
from xdit_launcher.node.agent import Agent
from xdit_launcher.node.sockets import probe_port

if TYPE_CHECKING:
    from xdit_core.plan import Plan

STRATEGIES = ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")


@dataclass(frozen=True)
class Settings:
    """Which cluster to use, and what to reserve of it."""

    address: str = field(
        default="auto", metadata={"help": "address of the cluster: HOST:PORT, or auto for the one that runs here"}
    )
    strategy: str = field(
        default="PACK", metadata={"help": "placement of the actors: PACK, SPREAD, STRICT_PACK or STRICT_SPREAD"}
    )
    cpus: float = field(default=1.0, metadata={"help": "CPUs that each actor reserves"})
    rdzv: str = field(default="", metadata={"help": "[HOST:]PORT at which the ranks meet; any free port of the first"})
    env: str = field(default="NCCL_*,GLOO_*", metadata={"help": "variables to pass on, by name"})
    wait: float = field(default=30.0, metadata={"help": "seconds to wait for resources that others use now"})


class AgentActor(Agent):
    """The agent in an actor: its messages are fetched instead of sent."""

    def __init__(self) -> None:
        self._unfetched: list[Mapping[str, Any]] = []
        super().__init__(self._unfetched.append)

    def node(self) -> str:
        """The id of the node of this actor, and its address."""
        import ray

        util: Any = ray.util
        return f"{ray.get_runtime_context().get_node_id()} {util.get_node_ip_address()}"

    def news(self) -> list[Mapping[str, Any]]:
        """The messages since the last call."""
        self.send_news()
        messages, self._unfetched[:] = list(self._unfetched), []
        return messages


class ActorConnection:
    """The connection to the agent in an actor.

    Args:
        actor: Ray's handle of it.
        number: of its host.
        deliver: takes the messages of the agent.
    """

    silence = 60.0  # Ray says when an actor or its node is gone; one that only has no CPU for a while is not

    def __init__(self, actor: Any, number: int, deliver: Deliver) -> None:
        self.actor, self.number, self.deliver = actor, number, deliver
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._fetch, daemon=True)
        self._thread.start()

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a request; Ray keeps the order."""
        if message["do"] != "ping":  # Ray itself notices when either side is gone
            self.actor.handle.remote(dict(message))

    def close(self) -> None:
        """Fetch no more; a call after the shutdown of Ray would start it again."""
        self._closed.set()
        self._thread.join(5)

    def _fetch(self) -> None:
        import ray

        while not self._closed.wait(0.1):
            try:
                for message in ray.get(self.actor.news.remote()):
                    self.deliver(self.number, message)
            except Exception as error:  # Ray's errors have no common class but this
                text = " ".join(str(error).split())
                self.deliver(
                    self.number, {"gone": f"its Ray actor is gone ({text[:200]}); see ray status and ray logs"}
                )
                return


def connected(settings: Settings) -> Any:
    """The module ``ray``, connected to the cluster.

    Raises:
        UsageError: Ray is not installed, or there is no cluster.
    """
    try:
        import ray
    except ImportError as error:
        raise UsageError("the backend ray needs the package ray; run pip install 'xdit[ray]'.") from error
    if settings.strategy not in STRATEGIES:
        raise UsageError(
            f"ray.strategy={settings.strategy} is unknown to Ray; use {', '.join(STRATEGIES[:-1])} or {STRATEGIES[-1]}."
        )
    try:
        probe_cluster(os.environ.get("RAY_ADDRESS", "auto") if settings.address == "auto" else settings.address)
        ray.init(
            address=settings.address,
            namespace="xdit",
            log_to_driver=False,
            logging_level=logging.ERROR,
            ignore_reinit_error=True,
        )
    except (OSError, RuntimeError, ValueError) as error:
        first = str(error).split("\n")[0].rstrip(".")
        raise UsageError(
            f"no Ray cluster answers at ray.address={settings.address} ({first}); start one with ray start --head, or "
            "give HOST:PORT."
        ) from error
    return ray


@contextlib.contextmanager
def connection(settings: Settings) -> Iterator[Any]:
    """The module ``ray``, connected to the cluster, which is left at the end; an actor belongs to it and stays.

    Raises:
        UsageError: as of `connected`.
    """
    ray = connected(settings)
    try:
        yield ray
    finally:
        if ray.get_runtime_context().get_actor_id() is None:
            ray.shutdown()


def probe_cluster(address: str) -> None:
    """Find out at once whether anybody answers at an address; Ray itself would try for minutes.

    Raises:
        OSError: nobody answers.
    """
    host, sign, port = address.removeprefix("ray://").rpartition(":")
    if sign and port.isdecimal() and len(port) < 6:
        probe_port(host, int(port))


def bundle(plan: Plan, settings: Settings, total: Mapping[str, float]) -> dict[str, float]:
    """The resources that each actor reserves.

    Args:
        total: the resources of the cluster.
    """
    gpu = (plan.device != "cpu" and total.get("GPU", 0) > 0) or plan.device == "cuda"
    return {"CPU": settings.cpus, **({"GPU": 1.0} if gpu else {})}


def check_room(ray: Any, plan: Plan, settings: Settings, each: Mapping[str, float]) -> None:
    """Make sure that the cluster has what the ranks need.

    Raises:
        UsageError: it does not.
    """
    total, nodes = ray.cluster_resources(), sum(1 for node in ray.nodes() if node["Alive"])
    for name, amount in each.items():
        if amount * plan.world > total.get(name, 0):
            need = f"{plan.world} processes need {amount * plan.world:g} {name}s"
            have = f"the Ray cluster has {total.get(name, 0):g} on {nodes} node{'s' if nodes > 1 else ''}"
            fix = f"lower the degrees{', lower ray.cpus=' if name == 'CPU' else ''}"
            raise UsageError(f"{need} and {have}; {fix}, or add nodes with ray start --address.")
    if settings.cpus <= 0:
        raise UsageError(f"ray.cpus={settings.cpus:g} is too small; give what an actor needs, such as 1.")
    if problem := host_facts.device_problem(
        plan, total.get("GPU", 0) > 0, f"the Ray cluster has {total.get('GPU', 0):g}"
    ):
        raise UsageError(problem)


@contextlib.contextmanager
def reserved(ray: Any, plan: Plan, settings: Settings) -> Iterator[Any]:
    """A placement group with a bundle for each rank; it ends with the context.

    In an actor that is in such a group itself, as a replica of Ray Serve is, it is that one.

    Raises:
        UsageError: the cluster does not have what is needed, or not now.
    """
    each = bundle(plan, settings, ray.cluster_resources())
    own = ray.util.get_current_placement_group()
    if own is not None and own.bundle_specs == [each] * plan.world:
        yield own
        return
    check_room(ray, plan, settings, each)
    group = ray.util.placement_group([each] * plan.world, strategy=settings.strategy)
    try:
        try:
            ray.get(group.ready(), timeout=settings.wait)
        except ray.exceptions.GetTimeoutError as error:
            free = ray.available_resources()
            have = ", ".join(f"{free.get(name, 0):g} {name}s free" for name in each)
            raise UsageError(
                f"Ray found no place for {plan.world} actors with {settings.strategy} within {settings.wait:g} s "
                f"({have}); wait for other work to end, choose another ray.strategy=, or give a larger ray.wait=."
            ) from error
        yield group
    finally:
        with contextlib.suppress(Exception):
            ray.util.remove_placement_group(group)


def start(plan: Plan, folder: Path, settings: Settings) -> int:
    """Run a plan on the cluster."""
    return supervise(plan, ranks(plan, folder, settings))


@contextlib.contextmanager
def ranks(plan: Plan, folder: Path, settings: Settings, serving: bool = False) -> Iterator[StartedOnHosts]:
    """Start the ranks of a plan on the cluster; see `xdit_launcher.cluster.run.started_on`."""
    with connection(settings) as ray, reserved(ray, plan, settings) as group:
        actors, names = start_actors(ray, group, plan.world, settings.wait)
        count = Counter(names)
        hosts = [Host(name, slots=1, sharing=count[name]) for name in names]

        def connect() -> Fleet:
            return Fleet(hosts, lambda i, deliver: ActorConnection(actors[i], i, deliver))

        with started_on(connect, plan, folder, settings, serving) as started:
            yield started


def start_actors(ray: Any, group: Any, world: int, seconds: float) -> tuple[list[Any], list[str]]:
    """Start an actor in each bundle of a placement group.

    Returns:
        The actors, and the address of the node of each; actors of one node are neighbours.

    Raises:
        UsageError: one does not start.
    """
    actor_class = ray.remote(max_restarts=0)(AgentActor)
    strategy = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy
    bundles = group.bundle_specs
    actors = [
        actor_class.options(
            num_cpus=bundles[i]["CPU"],
            num_gpus=bundles[i].get("GPU", 0),
            scheduling_strategy=strategy(group, placement_group_bundle_index=i),
        ).remote()
        for i in range(world)
    ]
    try:
        nodes = ray.get([actor.node.remote() for actor in actors], timeout=seconds + 30)
    except ray.exceptions.RayError as error:
        text = " ".join(str(error).split())
        raise UsageError(
            f"an actor did not start ({text[:300]}); install xdit on every node of the cluster, and see ray logs."
        ) from error
    order = sorted(range(world), key=lambda i: (nodes.index(nodes[i]), i))
    return [actors[i] for i in order], [nodes[i].split()[1] for i in order]


def devices(settings: Settings) -> int | None:
    """GPUs of the cluster, or its CPUs."""
    ray = connected(settings)
    total = ray.cluster_resources()
    return int(total.get("GPU", 0) or total.get("CPU", 0) // max(settings.cpus, 1)) or None


def show(plan: Plan, settings: Settings, words: Sequence[str]) -> list[str]:
    """Lines for a dry run."""
    each = bundle(plan, settings, connected(settings).cluster_resources())
    return [
        f"{plan.world} actors with {', '.join(f'{n:g} {name}' for name, n in each.items())} each, placed with "
        f"{settings.strategy}"
    ]
