"""The whole server as an application of Ray Serve, for its config files and KubeRay's RayService: the gangs are
replicas, and an actor listens in front of them. Without torch."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

from ray import serve

from xdit_core.errors import XditError
from xdit_core.plan import Plan
from xdit_core.planning.planner import make_plan
from xdit_launcher.arguments import names_in, values_of
from xdit_launcher.backends import ray as backend
from xdit_launcher.backends import registry
from xdit_launcher.backends.k8s_settings import FRONT
from xdit_launcher.gang.loras import LoraFile
from xdit_launcher.serve.auth import Keys, check_host
from xdit_launcher.serve.gangs.ray_serve import RayServeGangs, deployment_of
from xdit_launcher.serve.gangs.replicas import Replicas
from xdit_launcher.serve.limits import ServeSettings, take_settings

STARTING = 60.0  # seconds in which the server must listen


class Front:
    """The server in an actor: queue, jobs and APIs.

    Args:
        plan: as JSON.
        limits: of the server.
        replicas: how many gangs there may be.
        host, port, data, keys, loras: as of ``xdit-launch serve``.
        gangs: the handle of their deployment.
    """

    def __init__(
        self,
        plan: str,
        limits: ServeSettings,
        replicas: Replicas,
        host: str,
        port: int,
        data: str,
        keys: str | None,
        loras: str | None,
        gangs: Any,
    ) -> None:
        from xdit_launcher.serve.command import answer, listening

        self._stop, self._grace = threading.Event(), limits.grace
        known = Keys(keys)
        check_host(host, known)
        self._stack = contextlib.ExitStack()
        end = self._stack.enter_context(listening(host, port))
        made = Plan.from_json(plan)
        allowed = LoraFile(loras, made)
        source = RayServeGangs(serve, serve.get_replica_context().app_name, lambda _: gangs, replicas, allowed)
        self._stack.callback(source.close)
        words = (made, source, limits, known, allowed, data, host, end, self._stop)
        self._thread = threading.Thread(target=answer, args=words, name="xdit-server", daemon=True)
        self._thread.start()

    def check_health(self) -> None:
        """Called by Ray Serve.

        Raises:
            XditError: the server has ended.
        """
        if not self._thread.is_alive():
            raise XditError("the server has ended; see the log of its replica.")

    def __del__(self) -> None:
        self._stop.set()
        with contextlib.suppress(AttributeError):  # it was never started
            self._thread.join(self._grace)
            self._stack.close()


def build(arguments: dict[str, Any]) -> Any:
    """The application.

    Args:
        arguments: ``words`` as a list, settings as on the command line; ``plugins``, ``replicas``, ``host``, ``port``,
            ``data``, ``keys`` and ``loras`` as the options of ``xdit-launch serve``.

    Raises:
        XditError: a setting is wrong, or the plan is refused.
    """
    values, _ = values_of(arguments.get("words", ()))
    limits, values = take_settings(values)
    on, values = registry.choose("ray", {}, values)
    replicas = Replicas.parse(str(arguments.get("replicas", "1")))
    data = str(arguments["data"])
    plan = make_plan(names_in(arguments.get("plugins", "")), {"runs": f"{data.rstrip('/')}/runs", **values})
    each = backend.bundle(plan, on.settings, backend.connected(on.settings).cluster_resources())
    gangs = deployment_of(serve, plan, on.settings, replicas, limits, each)(0.0)
    host, port = str(arguments.get("host", "0.0.0.0")), int(arguments.get("port", 8080))
    front = serve.deployment(
        name="front",
        num_replicas=1,
        ray_actor_options={"num_cpus": 0, "resources": {FRONT: 1}},
        graceful_shutdown_timeout_s=limits.grace + STARTING,
    )(Front)
    return front.bind(
        plan.to_json(), limits, replicas, host, port, data, arguments.get("keys"), arguments.get("loras"), gangs
    )
