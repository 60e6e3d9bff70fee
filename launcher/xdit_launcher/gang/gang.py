"""The ranks of a plan, started once and kept for requests. Without torch."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, overload

from xdit_core.engine.pretrained import names_of, steps_observer
from xdit_core.errors import RequestCancelled, UsageError, XditError
from xdit_core.planning.planner import make_plan
from xdit_core.planning.requests import check_names, texts_of
from xdit_core.planning.single_call import check_single_call
from xdit_core.settings import RunSettings, convert, fields_of, without_random
from xdit_launcher.backends import registry
from xdit_launcher.gang.batch import Batch, next_batch
from xdit_launcher.gang.job import Event, GangEnded, GangRequest, Job, RequestFailed, Result
from xdit_launcher.gang.loras import AllowedLoras, checked
from xdit_launcher.node.root_cause import RootCause
from xdit_launcher.node.watching import Watch
from xdit_launcher.run_folders import run_folder

if TYPE_CHECKING:
    from xdit_core.plan import Plan
    from xdit_launcher.backends.base import Backend, StartedRanks

TICK = 0.1  # seconds between two looks at the ranks
FAREWELL = 10.0  # seconds for ranks to leave by themselves
UNWANTED = "the ranks were ended while they loaded, since nobody needs them any more; start others."
ALIKE = 10.0  # seconds without a sign of a rank, once another has failed, after which they have not failed alike


class Gang:
    """The ranks of a plan, which answer one request after the other.

    Example::

        with Gang(["usp"], {"model": "emoji", "usp.ulysses": 2}) as gang:
            gang.generate("red heart").images[0].save("heart.png")

    Args:
        plugins: names of strategies, as a list or as ``"usp,pipefusion"``.
        settings: flat settings as on the command line, those of a backend too: ``{"ssh.hosts": "a:4,b:4"}``. They are
            the defaults of every request.
        on: name of the backend that starts the ranks; by default this machine.
        plan: instead of the three, a plan that exists, with its ``backend``.
        batch: the most pictures that are drawn together: requests that wait and differ only in prompt, negative prompt
            and seeds become one call of the pipeline.
        loras: LoRAs that requests may ask for: a file, folder or hub id by name.
        unwanted: asked all the time while the ranks load; once it says True, they are ended.

    Attributes:
        loras: these, with their paths; others may be put in their place at any time.

    Raises:
        XditError: the plan is refused, or the ranks could not be started; all that is known is in the sentence.
            `GangEnded` if they were not wanted any more.
    """

    def __init__(
        self,
        plugins: str | Iterable[str] = (),
        settings: Mapping[str, Any] | None = None,
        *,
        on: str | None = None,
        plan: Plan | None = None,
        backend: Backend | None = None,
        batch: int = 1,
        loras: Mapping[str, str] | None = None,
        unwanted: Callable[[], bool] = lambda: False,
    ) -> None:
        if plan is None:
            backend, values = registry.choose(on, {}, dict(settings or {}))
            plan = make_plan(names_of(plugins), values, devices=backend.devices())
        if backend is None:
            raise UsageError("a gang of a plan needs the backend that starts its ranks.")
        backend.check(plan)
        self.plan, self.load_seconds = plan, 0.0
        self.loras = loras if isinstance(loras, AllowedLoras) else AllowedLoras(checked(loras or {}, plan, "loras="))
        self._backend, self._batch, self._unwanted = backend, batch, unwanted
        self._ids = itertools.count(1)
        self._wake = threading.Condition()
        self._queue: deque[Job] = deque()
        self._current: Batch | None = None
        self._error: XditError | None = None
        self._ranks: StartedRanks | None = None
        self._state = "starting"  # then "ready", at last "ended"
        self._stop = False
        self._thread = threading.Thread(target=self._run, name="xdit-gang", daemon=True)
        self._thread.start()
        try:
            with self._wake:
                self._wake.wait_for(lambda: self._state != "starting")
        except BaseException:
            self.close()
            raise
        if self._error is not None:
            raise self._error

    def __enter__(self) -> Gang:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()

    def __repr__(self) -> str:
        methods = "+".join(self.plan.plugins) or "serial"
        return f"Gang({self.plan.model}, {methods}, {self.plan.world} ranks, {self._state})"

    @property
    def alive(self) -> bool:
        """Whether the ranks are ready for requests."""
        return self._state == "ready"

    @property
    def error(self) -> XditError | None:
        """Why the ranks have ended, None while they live and if `close` ended them."""
        return self._error

    @overload
    def generate(self, prompt: str, *, progress: Any = None, **settings: Any) -> Result: ...

    @overload
    def generate(self, prompt: Sequence[str], *, progress: Any = None, **settings: Any) -> list[Result]: ...

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        progress: Callable[[int, int], None] | bool | None = None,
        **settings: Any,
    ) -> Result | list[Result]:
        """Draw ``images`` pictures of a prompt, or of each prompt in a list, and wait for them.

        Args:
            progress: called with ``(step, steps)``; True shows a bar, None shows one in a notebook only.
            settings: as of `submit`.

        Returns:
            One result for a prompt, a list of results for a list.

        Raises:
            RequestFailed, RequestCancelled, GangEnded: as of ``Job.result``.
        """
        prompts: list[str | Sequence[str]] = [prompt] if isinstance(prompt, str) else list(prompt)
        job = self.submit(prompts, **settings)
        observer = steps_observer(progress, rank=0)
        try:
            for event in job.events():
                if event.kind == "step" and observer is not None:
                    observer.step_done(event.step, event.steps)
            results = job.result()
        except KeyboardInterrupt:
            job.cancel()
            raise
        return results[0] if isinstance(prompt, str) else results

    def submit(
        self, prompts: str | Sequence[str | Sequence[str]], *, previews: int = 0, trace: bool = False, **settings: Any
    ) -> Job:
        """Put a request in the queue.

        Args:
            prompts: what to draw, a prompt or several. A list of texts in place of a prompt has one for each picture,
                which are drawn together; ``negative`` may be such a list too.
            previews: how many previews of each picture are wanted.
            trace: record what every rank does and when; the ranks must have been started with ``trace=yes``.
            settings: any of ``xdit_core.planning.requests.PER_REQUEST``, and ``call={...}`` with further arguments of
                the pipeline. ``lora`` has names of `loras` with scales, ``{"ink": 0.8}`` or ``"ink:0.8"``, which are
                added to those of the plan.

        Raises:
            UsageError: a setting is unknown, or decided by the plan.
            GangEnded: the ranks have ended.
        """
        chosen = (prompts,) if isinstance(prompts, str) else tuple(prompts)
        if (lora := self.loras.texts(settings.pop("lora", None) or {})) != []:
            settings["lora"] = (*self.plan.run.lora, *lora)
        if trace and not self.plan.run.trace:
            raise UsageError("a trace needs ranks that were started with trace=yes; start others, or leave it out.")
        request = GangRequest(chosen, checked_settings(chosen, settings), previews, trace)
        return self._put(request, seeds_of(self.plan, request.settings))

    def predict(self, arguments: bytes, grid: tuple[int, int] = (1, 1)) -> bytes:
        """Call the denoiser once, and wait for what it predicts.

        Args:
            arguments: of its forward, as safetensors.
            grid: rows and columns of tokens, where the latents are packed into tokens.

        Returns:
            Safetensors with the tensor ``prediction``.

        Raises:
            UsageError: a strategy of the plan needs more than one call.
            RequestFailed, RequestCancelled, GangEnded: as of ``Job.result``.
        """
        check_single_call(self.plan)
        job = self._put(GangRequest((), arguments=arguments, grid=grid), ())
        job.result()
        return next(event.data for event in job.events() if event.kind == "prediction")

    def _put(self, request: GangRequest, seeds: tuple[int, ...]) -> Job:
        """Put a request in the queue.

        Raises:
            GangEnded: the ranks have ended.
        """
        job = Job(str(next(self._ids)), request, seeds, self._look)
        with self._wake:
            if self._state == "ended" or self._stop:
                raise GangEnded(*(self._error.args if self._error else ("the gang is closed; make a new one.",)))
            self._queue.append(job)
        self._look()
        return job

    def close(self) -> None:
        """End the ranks, also while they load. What is drawn at this moment is cancelled, and so is what waits."""
        with self._wake:
            self._stop = True
        self._look()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _look(self) -> None:
        """Let the thread of the gang look at once at what is wanted."""
        ranks = self._ranks
        if ranks is not None:
            ranks.wake()

    # What follows runs in the thread of the gang. It starts the ranks as well: Linux ends them with the thread that
    # has started them, and a caller's thread may be short-lived.

    def _run(self) -> None:
        cause: list[str] = []
        try:
            with (
                run_folder(self.plan, ["xdit_launcher.Gang"]) as folder,
                self._backend.ranks(self.plan, folder) as ranks,
            ):
                self._ranks = ranks
                watch = Watch(self.plan.run.timeout, ranks.cause_patience, ranks.ask_for_stacks, ranks.elsewhere)
                cause = self._serve(ranks, watch)
        except XditError as error:
            self._end(error)
        except BaseException as error:
            self._end(XditError(f"{type(error).__name__}: {error}"))
            raise
        else:
            self._end(GangEnded(*cause) if cause else None)

    def _end(self, error: XditError | None) -> None:
        with self._wake:
            self._error, self._state, self._ranks = error, "ended", None
            batches = [*([self._current] if self._current else []), *(Batch([job]) for job in self._queue)]
            self._queue.clear()
            self._current = None
            self._wake.notify_all()
        for batch in batches:
            if error is None or batch.end_cancelled():
                batch.end("cancelled", RequestCancelled("the gang was closed."))
            else:
                batch.end("failed", GangEnded(*error.args))

    def _serve(self, ranks: StartedRanks, watch: Watch) -> list[str]:
        """Pass requests on until the gang is closed.

        Returns:
            The lines of the report of what ended the ranks, none if nothing did.
        """
        ready: set[int] = set()
        answer: Answer | None = None
        while True:
            for rank, message in ranks.messages(TICK):
                if "ready" in message:
                    ready.add(rank)
                    self.load_seconds = max(self.load_seconds, message["ready"])
                elif answer is not None and message.get("id") == answer.batch.id:
                    answer.take(rank, message)
            if self._state == "starting" and len(ready) == self.plan.world:
                with self._wake:
                    self._state = "ready"
                    self._wake.notify_all()
            if self._state == "starting" and (self._stop or self._unwanted()):
                ranks.stop()  # ranks that load hear nothing
                return [] if self._stop else [UNWANTED]
            if cause := watch.look(ranks.statuses, idle=self._state == "ready" and answer is None):
                return ranks.report(cause)
            if answer is not None:
                if answer.batch.end_cancelled() or self._stop:
                    answer.cancel(ranks)
                if answer.ended:
                    again = answer.finish()
                    with self._wake:
                        self._queue.extendleft(reversed(again))
                    answer = None
                elif answer.torn():
                    return ranks.report(answer.cause(ranks.statuses()))
            if self._stop and answer is None:
                farewell(ranks)
                return []
            if answer is None and self._state == "ready":
                answer = self._next(ranks)

    def _next(self, ranks: StartedRanks) -> Answer | None:
        """Begin the next request of the queue, with those that fit it."""
        with self._wake:
            self._current = batch = next_batch(self._queue, self._batch)
        if batch is None:
            return None
        ranks.send(batch.begin())
        return Answer(batch, self.plan.world, self.loras)


class Answer:
    """What the ranks have said of the requests that they answer.

    Args:
        batch: the requests.
        world: number of ranks.
        loras: whose paths nobody is to see.
    """

    def __init__(self, batch: Batch, world: int, loras: AllowedLoras | None = None) -> None:
        self.batch, self.world, self._loras = batch, world, loras or AllowedLoras()
        self.ends: dict[int, Mapping[str, Any]] = {}
        self._cancelled = False
        self._heard = time.monotonic()

    def take(self, rank: int, message: Mapping[str, Any]) -> None:
        """A rank has said something."""
        self._heard = time.monotonic()
        if message["event"] == "end":
            self.ends[rank] = message
        else:
            self.batch.take(message)

    def cancel(self, ranks: StartedRanks) -> None:
        """Tell the ranks once that the request is cancelled."""
        if not self._cancelled:
            self._cancelled = True
            ranks.send({"cancel": self.batch.id})

    @property
    def ended(self) -> bool:
        """Whether every rank has come to the end."""
        return len(self.ends) == self.world

    def failures(self) -> dict[int, Mapping[str, Any]]:
        """The ranks that have failed, each with what it said."""
        return {rank: end for rank, end in sorted(self.ends.items()) if end["outcome"] == "failed"}

    def torn(self) -> bool:
        """Whether some ranks have failed and others, for long, have not: they wait for those that failed."""
        return bool(self.failures()) and not self.ended and time.monotonic() - self._heard > ALIKE

    def cause(self, statuses: Mapping[int, Any]) -> RootCause:
        """The rank that failed, where others did not."""
        rank, end = next(iter(self.failures().items()))
        known = statuses[rank]
        return RootCause(rank, known.host, known.status, f"{end['error']} (on this rank only)", 1, known.log)

    def finish(self) -> list[Job]:
        """Every rank has come to the end: say how.

        Returns:
            Requests to draw again one by one, because one of them may have made all fail.
        """
        failed = self.failures()
        if failed and len(self.batch.jobs) > 1:
            return self.batch.apart()
        if failed:
            end = next(iter(failed.values()))
            self.batch.end("failed", RequestFailed(self._loras.named(str(end["error"])), bool(end["refused"])))
        elif self._cancelled or any(end["outcome"] == "cancelled" for end in self.ends.values()):
            self.batch.end("cancelled", RequestCancelled())
        else:
            self.batch.end("done", peak=max(int(end.get("peak") or 0) for end in self.ends.values()))
        return []


def farewell(ranks: StartedRanks) -> None:
    """Let the ranks leave by themselves; whoever does not is ended afterwards."""
    ranks.send({"stop": True})
    end = time.monotonic() + FAREWELL
    while time.monotonic() < end and any(s.code is None for s in ranks.statuses().values()):
        ranks.messages(TICK)  # agents on other machines tell in them that a rank has ended
    ranks.finish()


def checked_settings(prompts: Sequence[Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a request, as the ranks take them: what is wrong with them alone is refused here.

    Raises:
        UsageError: there is no prompt, or a setting is unknown or of a wrong type.
    """
    texts, negatives, settings = texts_of(prompts, settings)
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise UsageError('there is no prompt; write what to draw, such as "red heart".')
    check_names(settings, "a request")
    kinds = fields_of(RunSettings)
    values = without_random({k: v for k, v in settings.items() if v is not None})
    converted = {k: convert(k, v, kinds[k]) if k in kinds else v for k, v in values.items()}
    if "call" in converted:  # as text, so that the ranks check the types of values as on the command line
        call = converted["call"]
        if not isinstance(call, Mapping):
            raise UsageError(f"call={call!r:.60} is not a mapping; write call={{'name': value}}.")
        try:
            converted["call"] = {str(k): v if isinstance(v, str) else json.dumps(v) for k, v in call.items()}
        except (TypeError, ValueError) as error:
            raise UsageError(
                f"call= holds something that cannot be sent to the ranks ({error}); give numbers, words, lists or None."
            ) from error
    converted |= {"negative": negatives} if negatives else {}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in converted.items()}


def seeds_of(plan: Plan, settings: Mapping[str, Any]) -> tuple[int, ...]:
    """The seeds of the pictures of each prompt of a request; the ranks refuse a list of another length."""
    run = replace(plan.run, seed=tuple(settings.get("seed", plan.run.seed)))
    images = int(settings.get("images", run.images)) if len(run.seed) == 1 else len(run.seed)
    return tuple(map(run.seed_of, range(images)))


__all__ = ["Event", "Gang", "GangEnded", "GangRequest", "Job", "RequestFailed", "Result"]
