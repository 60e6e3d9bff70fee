"""Gangs as replicas of Ray Serve, which places them, routes requests to those that are free, starts another for one
that has died, and as many as the queue needs. Without torch."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING, Any

from xdit_core.errors import RequestCancelled, UsageError, XditError
from xdit_launcher.backends import ray as backend
from xdit_launcher.gang.job import Event, GangEnded, Result
from xdit_launcher.serve.gangs.ray_replica import Replica
from xdit_launcher.serve.gangs.replicas import Replicas

if TYPE_CHECKING:
    from xdit_core.plan import Plan
    from xdit_launcher.gang.loras import AllowedLoras
    from xdit_launcher.serve.limits import ServeSettings

DEPLOYMENT = "gang"
LOOK = 0.5  # seconds between two looks at the replicas
HEALTH_PERIOD, HEALTH_TIMEOUT = 2.0, 30.0  # seconds between two questions, and for an answer
UPSCALE_DELAY = 2.0  # seconds for which more jobs must be there than replicas
PATIENCE = 3600.0  # seconds to wait for a replica


class RemoteJob:
    """A request on its way through Ray Serve; as `xdit_launcher.gang.job.Job`.

    Args:
        answers: what the replica says, see `Replica.draw`.
    """

    def __init__(self, answers: Any) -> None:
        self._answers, self._cancelled = answers, False
        self._end: list[Result] | XditError = GangEnded("the replica has ended without an answer.")

    def cancel(self) -> None:
        """End the request as soon as possible."""
        self._cancelled = True
        self._answers.cancel()

    def events(self) -> Iterator[Event]:
        """Yield what happens, until the end."""
        try:
            for answer in self._answers:
                if isinstance(answer, Event):
                    yield answer
                else:
                    self._end = answer
        except (Exception, CancelledError) as error:  # Ray's errors have no common class but this
            text = " ".join(str(error).split())
            self._end = GangEnded(f"its replica is gone ({text[:200]}); see ray status and ray logs.")

    def result(self) -> list[Result]:
        """What each prompt gave.

        Raises:
            RequestFailed, RequestCancelled, GangEnded: as of ``Job.result``.
        """
        if isinstance(self._end, XditError):
            raise RequestCancelled() if self._cancelled and isinstance(self._end, GangEnded) else self._end
        return self._end


class RemoteGang:
    """One of the gangs of Ray Serve, whichever is free.

    Args:
        gangs: all of them.
        number: counts them from 0.
    """

    def __init__(self, gangs: RayServeGangs, number: int, load_seconds: float) -> None:
        self._gangs, self._number, self.load_seconds = gangs, number, load_seconds

    @property
    def alive(self) -> bool:
        """Whether there is a replica for its requests."""
        return self._gangs.has(self._number)

    @property
    def error(self) -> XditError | None:
        """Why there is none."""
        return None if self.alive else GangEnded(self._gangs.message)

    def submit(self, prompts: Any, *, previews: int = 0, **settings: Any) -> RemoteJob:
        """Send a request to a replica."""
        draw = self._gangs.handle.options(stream=True).draw
        return RemoteJob(draw.remote(prompts, previews, settings, dict(self._gangs.loras)))

    def close(self) -> None:
        """Nothing: Ray Serve ends the replicas."""


class RayServeGangs:
    """The replicas of an application.

    Args:
        serve: the module ``ray.serve``.
        app: name of the application.
        deploy: deploys replicas in the place of those that were deployed with another number; returns the handle.
        replicas: how many there may be.
        loras: that requests may ask for.
    """

    def __init__(
        self, serve: Any, app: str, deploy: Callable[[float], Any], replicas: Replicas, loras: AllowedLoras
    ) -> None:
        self.loras = loras
        self.handle, self.message = deploy(time.time()), "Ray Serve starts the replicas."
        self._deploy = deploy
        # further requests tell Ray Serve to start further replicas
        self.replicas = Replicas(replicas.most, replicas.most)
        self._serve, self._app, self._least, self._scales = serve, app, replicas.least, replicas.least < replicas.most
        self._running, self._failed = 0, False
        self._changed, self._stop = threading.Condition(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="xdit-ray-serve", daemon=True)
        self._thread.start()

    def has(self, number: int) -> bool:
        """Whether a replica runs for the gang of a number."""
        return number < self._running or (self._scales and number >= self._least and self._running > 0)

    def start(self, number: int, unwanted: Callable[[], bool] = lambda: False) -> RemoteGang:
        """Wait for a replica; Ray Serve ends the replicas that are not wanted.

        Raises:
            XditError: it could not be started.
        """
        end = time.monotonic() + PATIENCE
        with self._changed:
            while not (self.has(number) or self._failed or self._stop.is_set() or unwanted()):
                if time.monotonic() > end:
                    break
                self._changed.wait(LOOK)
        if not self.has(number):
            raise XditError(self.message)
        seconds = float(self.handle.load_seconds.remote().result(timeout_s=PATIENCE)) if number == 0 else 0.0
        return RemoteGang(self, number, seconds)

    def running(self) -> int | None:
        """How many replicas run."""
        return self._running

    def renew(self) -> bool:
        """Let Ray Serve put fresh replicas in the place of all that run, one after the other."""
        self._deploy(time.time())
        return True

    def close(self) -> None:
        """Look at the replicas no more."""
        self._stop.set()
        self._thread.join()
        with self._changed:
            self._changed.notify_all()

    def _watch(self) -> None:
        while not self._stop.wait(LOOK):
            try:
                found = self._serve.status().applications.get(self._app)
                if found is None:
                    continue
                deployment = found.deployments.get(DEPLOYMENT)
                states = dict(deployment.replica_states) if deployment else {}
                messages = [found.message, deployment.message if deployment else ""]
                running = sum(count for state, count in states.items() if state == "RUNNING")
                failed = found.status == "DEPLOY_FAILED"
            except Exception as error:  # Ray's errors have no common class but this
                messages, running, failed = [f"Ray Serve does not answer ({error})"], 0, False
            with self._changed:
                self._running, self._failed = running, failed
                self.message = next(
                    (text.strip() for text in messages if text.strip()), "no replica of Ray Serve runs."
                )
                self._changed.notify_all()


def deployment_of(
    serve: Any,
    plan: Plan,
    settings: backend.Settings,
    replicas: Replicas,
    limits: ServeSettings,
    each: Mapping[str, float],
) -> Callable[[float], Any]:
    """Make the deployment of the gangs of a plan.

    Args:
        serve: the module ``ray.serve``.
        each: the resources of each rank.

    Returns:
        A function that gives the application for a generation; replicas of another generation are replaced.
    """
    scale: Mapping[str, Any] = {"num_replicas": replicas.least}
    if replicas.least < replicas.most:
        scale = {
            "autoscaling_config": {
                "min_replicas": replicas.least,
                "max_replicas": replicas.most,
                "target_ongoing_requests": limits.at_once,
                "upscale_delay_s": UPSCALE_DELAY,
                "downscale_delay_s": limits.idle,
                "metrics_interval_s": 1.0,
                "look_back_period_s": 2.0,
            }
        }
    deployment = serve.deployment(
        name=DEPLOYMENT,
        **scale,
        health_check_period_s=HEALTH_PERIOD,
        health_check_timeout_s=HEALTH_TIMEOUT,
        max_ongoing_requests=limits.at_once,
        graceful_shutdown_timeout_s=limits.grace,
        placement_group_bundles=[each] * plan.world,
        placement_group_strategy=settings.strategy,
        ray_actor_options={"num_cpus": 0},
    )(Replica)
    return lambda generation: deployment.bind(plan.to_json(), settings, limits.batch, generation)


@contextlib.contextmanager
def serving(
    plan: Plan, settings: backend.Settings, replicas: Replicas, limits: ServeSettings, name: str, loras: AllowedLoras
) -> Iterator[RayServeGangs]:
    """Deploy the gangs of a plan; they end with the context.

    Args:
        name: of the server.
        loras: that requests may ask for.

    Raises:
        UsageError: there is no cluster, or no Ray Serve, or the cluster has too little.
    """
    with backend.connection(settings) as ray:
        try:
            from ray import serve
        except ImportError as error:
            raise UsageError("--replicas on ray needs Ray Serve; run pip install 'xdit[ray]'.") from error
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        each = backend.bundle(plan, settings, ray.cluster_resources())
        backend.check_room(ray, plan, settings, each)
        application = deployment_of(serve, plan, settings, replicas, limits, each)
        serve.start(proxy_location="Disabled")

        def deploy(generation: float) -> Any:
            target = serve.RunTarget(application(generation), name=name, route_prefix=None)
            return serve.run_many([target], wait_for_applications_running=False)[0]

        gangs = RayServeGangs(serve, name, deploy, replicas, loras)
        try:
            yield gangs
        finally:
            gangs.close()
            with contextlib.suppress(Exception):  # such as a cluster that is gone
                serve.delete(name)
                gangs.handle.shutdown()
