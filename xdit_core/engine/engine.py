"""The engine of one rank: load the pipeline, put the wraps of the strategies in, and answer requests.

The pipeline and its scheduler run unmodified; only ``transformer(...)`` and ``vae.decode(...)`` do something else.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, overload

import torch
import torch.distributed as dist

from xdit_core.checkpoints.model_facts import INDEX
from xdit_core.checkpoints.weights import read_json
from xdit_core.engine.calling import Schedulers, StepLoop, call_arguments, call_values, without_texts
from xdit_core.engine.cancellation import Cancellation, Cancelled, Left, finite, store_of_group
from xdit_core.engine.clock import Clock, seconds_of
from xdit_core.engine.components import denoisers_of
from xdit_core.engine.given import adopt_pipeline, check_given, configs_of, precision
from xdit_core.engine.loading import load_pipeline
from xdit_core.engine.lora.changing import Loras
from xdit_core.engine.noise import PictureStreams
from xdit_core.engine.pretrained import plan_from, steps_observer
from xdit_core.errors import RequestCancelled, UsageError, XditError
from xdit_core.model_spec import ModelSpec
from xdit_core.observe.lockstep import Lockstep
from xdit_core.observe.observer import Observer, combined
from xdit_core.observe.recording import Recorder
from xdit_core.observe.rows import watch_rows
from xdit_core.observe.status import Phase, Status
from xdit_core.observe.trace import Trace
from xdit_core.observe.weaving import watching
from xdit_core.parallel.mesh import Mesh
from xdit_core.parallel.patch_tensor import materialized
from xdit_core.parallel.placements import evaluated
from xdit_core.parallel.rank import Rank
from xdit_core.plan import Plan
from xdit_core.planning.requests import plan_of_request, texts_of
from xdit_core.planning.single_call import check_single_call
from xdit_core.points.attention import AttentionPoint
from xdit_core.points.branches import watched
from xdit_core.points.compose import OwnedWrap, compose
from xdit_core.points.context import ForwardContext, JobState
from xdit_core.points.contracts import contract, given_contract
from xdit_core.points.forward import ForwardPoint
from xdit_core.points.request import Job, Output, Request, RunRequest, alone, jobs_for, joined
from xdit_core.points.trunk import Trunk, replace_blocks
from xdit_core.records import PHASES, Built
from xdit_core.registry.owned_observer import OwnedObserver
from xdit_core.registry.owners import OwnedContext, Owner
from xdit_core.registry.registry import Registry
from xdit_core.registry.validation import check_built, check_observer
from xdit_core.settings import ModelSettings, build, parse_loras

BEFORE_VALUES = frozenset(("adapt", "shard"))  # phases that change the denoiser while its parameters have shapes only
AFTER_WEAVING = frozenset(("offload",))  # phases that must see the forward of the strategies


Progress = Callable[[int, int], None]


class Engine:
    """One pipeline on one rank, with the strategies of a plan.

    Args:
        plan: what to run. If it has more than one rank, the default process group must be initialized with that number
            of ranks.
        registry: where the plugins come from, by default the installed ones.
        pipe: a loaded diffusers pipeline to use instead of loading the one of the plan. It is not changed; parameters
            that need no change share memory with it. A pipeline that was changed after loading (adapters, hooks, other
            attention processors) is refused.
        progress: called with ``(step, steps)`` after each step. True shows a progress bar, None shows one in a notebook
            only.
        observer: told of everything that happens on this rank.

    Attributes:
        broken: a request failed, and the ranks may no longer agree on what was sent.
    """

    def __init__(
        self,
        plan: Plan,
        registry: Registry | None = None,
        pipe: Any = None,
        progress: Progress | bool | None = None,
        observer: Observer | None = None,
    ) -> None:
        self._registry = registry = registry or Registry()
        registry.select(plan.plugins)
        spec, _ = registry.model(plan.model)
        self.plan = plan
        started = time.perf_counter()
        device, dtype = torch.device(plan.device), getattr(torch, plan.dtype)
        if pipe is not None:
            asked = {**dataclasses.asdict(plan.run), **plan.call}
            check_given(pipe, spec, plan.facts, asked, plan.values.get("dtype"))
            dtype = precision(pipe, spec)
        if device.type == "cuda":
            device = torch.device("cuda", torch.cuda.current_device())
        mesh = Mesh(plan.axes, device.type)
        self.trace = Trace() if plan.run.trace or plan.run.profile else None
        self.recorder = Recorder(plan, mesh.rank) if plan.run.record else None
        self.rank = Rank(plan, spec, mesh, device, dtype)
        self.owner = plan.owns(mesh.rank)
        own = {name: {"settings": value, "rank": self.rank} for name, value in self._settings(registry).items()}
        own_observers = (self.trace, self.recorder, observer, steps_observer(progress, mesh.rank))
        observer = self.rank.observer = combined((*own_observers, *self._observers(registry, own)))
        self._built = self._build(registry, own)
        observer.status(Status(Phase.LOADING, "the model"))
        early, late = self._transforms(BEFORE_VALUES), self._transforms(AFTER_WEAVING)
        where, scales = torch.device("cpu") if late else device, parse_loras(plan.run.lora)
        if pipe is None:
            trust, folder = build(ModelSettings, "model.", plan.values).trust_remote_code, Path(plan.folder)
            loaded = load_pipeline(spec, folder, self.rank.blocks, where, dtype, early, trust, scales, observer)
        else:
            loaded = adopt_pipeline(spec, pipe, self.rank.blocks, where, early, scales)
        self.pipe = self.rank.pipe = loaded.pipe
        self._loras = Loras(self.rank, loaded, scales)
        self._schedulers = Schedulers(self.pipe, plan.run.scheduler)
        for change in self._transforms(set(PHASES) - BEFORE_VALUES - AFTER_WEAVING):
            change(self.pipe)
        self._weave(spec)
        for change in late:
            change(self.pipe)
        if observer.overrides("rows"):
            watch_rows(self.rank, self.trunks, denoisers_of(self.pipe, spec).values())
        self._wants_latents = False
        self._configs = configs_of(self.pipe, read_json(Path(plan.folder) / INDEX))
        self.load_seconds = time.perf_counter() - started
        observer.engine_built(self.load_seconds)
        self._clock = Clock(device)
        self.broken = False
        self._shows = self.owner and observer.overrides("step_latents")
        store = store_of_group() if plan.ranks_of_a_picture > 1 else None
        owner = plan.owner_of(mesh.rank)
        self._cancellation = Cancellation(mesh.rank, owner, store, self._shows, self.rank.waiting)

    @classmethod
    def from_pretrained(
        cls,
        model: str | PathLike[str],
        plugins: str | Iterable[str] = (),
        *,
        registry: Registry | None = None,
        pipe: Any = None,
        progress: Progress | bool | None = None,
        observer: Observer | None = None,
        **settings: Any,
    ) -> Engine:
        """Make an engine from the name of a model, a folder or a hub id.

        Example::

            with Engine.from_pretrained("emoji", plugins=["pipefusion"], pipefusion={"patches": 4}) as engine:
                engine.generate("rocket", seed=3).images[0].save("rocket.png")

        Args:
            model, plugins, settings: as of ``xdit_core.engine.pretrained.plan_from``.
            registry, pipe, progress, observer: as of the class.
        """
        world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        return cls(plan_from(model, plugins, registry, world, **settings), registry, pipe, progress, observer)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *details: Any) -> None:
        self.close()

    def __repr__(self) -> str:
        plan, rank = self.plan, self.rank
        methods = "+".join(plan.plugins) or "serial"
        return f"Engine({plan.model}, {methods}, rank {rank.mesh.rank} of {plan.world}, {rank.device}, {rank.dtype})"

    def _settings(self, registry: Registry) -> dict[str, Any]:
        """The settings of every plugin."""
        classes = registry.call("xdit_settings", {name: {} for name in self.plan.plugins})
        return {name: build(classes.get(name), name + ".", self.plan.values) for name in self.plan.plugins}

    def _observers(self, registry: Registry, arguments: Mapping[str, Mapping[str, Any]]) -> list[Observer]:
        """The observers of the plugins."""
        observers = registry.call("xdit_observe", arguments)
        for name, observer in observers.items():
            check_observer(observer, self._owner_of(name))
        return [OwnedObserver(observer, self._owner_of(name)) for name, observer in observers.items()]

    def _build(self, registry: Registry, arguments: Mapping[str, Mapping[str, Any]]) -> dict[str, Built]:
        """Build the callables of every strategy."""
        plan, built = self.plan, registry.call("xdit_build", arguments)
        for name in plan.plugins:
            wraps = [
                f"{point}/{level}" for point, pairs in plan.wraps.items() for level, other in pairs if other == name
            ]
            phases = [phase for phase, other in plan.transforms if other == name]
            check_built(built.get(name), wraps, phases, self._owner_of(name))
        return built

    def _owner_of(self, plugin: str) -> Owner:
        """Return the owner of a plugin, for messages."""
        return Owner("plugin", plugin, *self.plan.plugins[plugin])

    def _transforms(self, phases: Collection[str]) -> list[Callable[[Any], None]]:
        """Return the transforms of some phases, in the order of the plan."""
        changes: list[Callable[[Any], None]] = []
        for phase, name in self.plan.transforms:
            change = self._built[name].transforms[phase]
            if phase in phases:
                changes.append(partial(self._owner_of(name).call, f"its transform in the phase {phase}", change))
        return changes

    def _weave(self, spec: ModelSpec) -> None:
        """Compose the wraps of the strategies in the order of the plan, and put them where the pipeline calls them."""
        plan, built = self.plan, self._built
        self.trunks: list[Trunk]
        self.forwards: list[ForwardPoint]
        chains: dict[str, list[Any]] = {}
        for point, pairs in plan.wraps.items():
            for level, name in pairs:
                wrap = built[name].wraps[f"{point}/{level}"]
                check = contract(self.rank, point, level, self.owner)
                owned = OwnedWrap(wrap, self._owner_of(name), f"{point}/{level}", check, given_contract(point))
                chain = chains.setdefault("kernel" if level == "kernel" else point, [])
                chain += [*watching(self.rank.observer, point, level, name), owned]
        woven = bool(spec.trunk.blocks) and bool(
            plan.stages or plan.patches > 1 or {"trunk", "attention", "kernel"} & chains.keys()
        )
        used = {"request", "forward", "decode", *(["trunk"] if woven else [])}
        used |= {"attention"} if {"attention", "kernel"} & chains.keys() else set()
        for point in used:  # the model's own code; what computes attention lies behind the choice of the mask
            innermost = chains.setdefault("kernel" if point == "attention" else point, [])
            innermost += watching(self.rank.observer, point)
        running, self._state = self.rank.running, JobState()
        self.trunks, self.forwards = [], []
        for name, denoiser in denoisers_of(self.pipe, spec).items():
            if woven:
                attention = AttentionPoint(running, chains.get("attention", []), chains.get("kernel", []))
                self.trunks += replace_blocks(denoiser, spec, running, attention, chains.get("trunk", []))
            self.forwards.append(ForwardPoint(self.rank, name, denoiser, chains.get("forward", []), self._state, woven))
        for trunk in self.trunks:
            trunk.watch(self.rank.observer)
        self.decode: Callable[..., Any] | None = None
        if getattr(self.pipe, "vae", None) is not None:
            self.decode = compose(chains.get("decode", []), self.pipe.vae.decode)
            self.pipe.vae.decode = self._decode
        self.pipe.progress_bar = self._progress_bar
        self._run: RunRequest = compose(chains.get("request", []), self._one_by_one)

    @overload
    def generate(self, prompt: str | None = None, **changes: Any) -> Output: ...

    @overload
    def generate(self, prompt: Sequence[str], **changes: Any) -> list[Output]: ...

    def generate(self, prompt: str | Sequence[str] | None = None, **changes: Any) -> Output | list[Output]:
        """Draw ``images`` pictures of one prompt, or of each prompt in a list; see ``generate_all``.

        Args:
            prompt: a prompt or a list of prompts; None if ``call={"prompt_embeds": ...}`` says what to draw.

        Returns:
            One output for a prompt, a list of outputs for a list.
        """
        if prompt is None or isinstance(prompt, str):
            return self.generate_all([prompt], **changes)[0]
        return self.generate_all(prompt, **changes)

    @torch.no_grad()
    def generate_all(
        self,
        prompts: Sequence[str | Sequence[str] | None],
        skip: Collection[tuple[int, int]] = (),
        cancelled: Callable[[], bool] | None = None,
        **changes: Any,
    ) -> list[Output]:
        """Draw ``images`` pictures of each prompt. Every rank of the plan must call it with the same arguments.

        Args:
            prompts: what to draw; ``[None]`` if embeddings in ``call`` say so. A list of texts in place of a prompt has
                one for each picture, which are drawn together; ``negative`` may be such a list too.
            skip: pictures that are not drawn, as (index of the prompt, number of the picture). The other pictures of a
                prompt may come in several outputs.
            cancelled: asked before each step, on ranks that own pictures, whether the request is to end; all ranks
                leave at the same step, within two steps. All ranks give a function, or none does.
            changes: any of ``xdit_core.planning.requests.PER_REQUEST``, and ``call={...}`` with further arguments of
                the pipeline's ``__call__``.

        Returns:
            An output for each prompt. Pictures are on rank 0, latents on all ranks.

        Raises:
            UsageError: an argument is unknown, or the plan has decided it.
            PlanRefused: a value is not possible.
            RequestCancelled: the request was ended early; ``outputs`` has what was finished.
            XditError: the result is not a number; or an earlier request failed, after which several ranks no longer
                agree on what was sent.
        """
        texts, negatives, changes = texts_of(prompts, changes)
        asked = plan_of_request(self.plan, self.rank.spec, self._registry, type(self.pipe).__name__, texts, changes)
        run, more = asked.run, asked.call
        jobs = jobs_for(prompts, run.images, skip, negatives)
        lockstep = Lockstep(self.rank) if run.lockstep and self.plan.world > 1 else nullcontext()
        scales = parse_loras(run.lora) if changes.get("lora") is not None else None
        with self._guarded(), lockstep, self._schedulers.of_request(run.scheduler):
            self._loras.change(scales)
            self._cancellation.begin(cancelled)
            outputs = self._run(Request(jobs, run, more))
        for output in outputs:
            if output.failure is not None:
                if isinstance(output.failure, RequestCancelled):
                    output.failure.outputs = [o for o in outputs if o.failure is None]
                raise output.failure
        return outputs

    @torch.no_grad()
    def predict(self, arguments: Mapping[str, torch.Tensor], grid: tuple[int, int] = (1, 1)) -> torch.Tensor:
        """Call the denoiser once. Every rank of the plan must call it with the same arguments, and gets the prediction.

        Args:
            arguments: of the denoiser's forward, by name.
            grid: rows and columns of tokens, where the latents are packed into tokens.

        Raises:
            UsageError: a strategy of the plan needs more than one call, or an argument is unknown.
        """
        check_single_call(self.plan)
        denoiser = getattr(self.pipe, self.rank.spec.checkpoint.denoiser)
        given = {name: tensor.to(self.rank.device) for name, tensor in arguments.items()}
        with self._guarded(), self._around_job(1, grid):
            self._loras.change()
            self.rank.observer.status(Status(Phase.DENOISING))
            prediction: torch.Tensor = materialized(denoiser(**given, return_dict=False)[0])
        return prediction

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Surround a request: if it fails after a call of the denoiser, the engine is broken and refuses others."""
        if self.broken:
            raise XditError(
                "an earlier request failed, and the ranks no longer agree on what was sent; make a new Engine."
            )
        self.rank.slow.clear()
        calls = self._state.calls
        try:
            yield
        except BaseException as error:
            refused = isinstance(error, (XditError, ValueError, TypeError)) and self._state.calls == calls
            self.broken = self.plan.world > 1 and not refused
            raise

    def _one_by_one(self, request: Request) -> list[Output]:
        """Run the jobs of this rank."""
        outputs, spec = [], self.rank.spec
        # some pipelines draw only one picture in a call, and with embeddings all of them do
        single = (not spec.request.takes("images") and spec.request.encode_subject is None) or request.more.get(
            "prompt_embeds"
        ) is not None
        jobs = [part for job in request.jobs for part in (alone(job) if single else (job,))]
        for job in jobs:
            self.rank.observer.job_started(job)
            outputs.append(self._draw(job, request))
            if outputs[-1].failure is not None:
                break
            if self.owner:
                self.rank.observer.output_done(outputs[-1])
        return joined(outputs, in_turn=True) if single else outputs

    def _draw(self, job: Job, request: Request) -> Output:
        """Run one call of the pipeline."""
        self._clock.start()
        run, spec, output = request.run, self.rank.spec, Output(job.prompt, job.index, job.numbers)
        texts = call_arguments(run, spec, job, self._configs)
        arguments = {**without_texts(texts, request.more), **call_values(request.more, job.numbers, run.images)}
        side = self.plan.facts.pixels_per_token
        grid = ((run.height or 0) // side, (run.width or 0) // side)
        self.rank.seconds.clear()
        self.rank.observer.status(Status(Phase.ENCODING, "the prompt"))
        self._wants_latents = run.output_type == "latent"
        seeds = [run.seed_of(i) % 2**63 for i in job.numbers]
        streams = PictureStreams(seeds, self.rank.device) if len(seeds) > 1 else None
        with (
            self._around_job(len(job.numbers), grid),
            torch.random.fork_rng(devices=[self.rank.device] if self.rank.device.type == "cuda" else []),
            watched(self.pipe.scheduler, self._stepped, streams),
        ):
            torch.manual_seed(seeds[0])  # stochastic schedulers use the default generator
            try:
                result = self.pipe(**arguments)[0]
                if self._wants_latents:
                    output.latents = finite(materialized(result), "the latents", self.rank.dtype)
                elif self.owner:
                    output.images = list(result)
            except Left as left:
                self.pipe.maybe_free_model_hooks()
                output.latents, output.failure = left.latents, left.failure
            last = evaluated(self._cancellation.latents) if self._shows and output.failure is None else None
            if last is not None:
                self.rank.observer.step_latents(self._state.step, last)
        phases = self._clock.phases()
        self.rank.observer.job_done(job, phases)
        output.seconds, output.slow = seconds_of(phases, self.rank.seconds), dict(self.rank.slow)
        return output

    @contextmanager
    def _around_job(self, pictures: int, grid: tuple[int, int]) -> Iterator[None]:
        """Surround one call of the pipeline. Afterwards strategies release what they acquired for it, and its tensors
        are dropped."""
        with ExitStack() as stack:
            stack.callback(self._forget_job)
            self._forget_job()
            self._state.begin(pictures, grid)
            for name, built in self._built.items():
                if built.job:
                    stack.enter_context(OwnedContext(built.job, self._owner_of(name), "a job"))
            yield

    def _forget_job(self) -> None:
        """Drop the tensors of a job."""
        self._state.clear()
        self._cancellation.forget()
        self.rank.running.context = ForwardContext()
        for point in self.forwards:
            point.clear()

    def _decode(self, latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Replace ``vae.decode``: all ranks gather the latents, then the owner decodes, or the ranks that a strategy
        chooses."""
        self.rank.observer.status(Status(Phase.GATHERING, "the latents"))
        latents = finite(materialized(latents), "the latents", self.rank.dtype)
        if not self._clock.has("decoding"):  # else the pipeline decodes in parts
            self._clock.mark("denoised", "decoding")
        if self._wants_latents:
            raise Left(latents)
        self.rank.observer.latents(latents)
        if self.decode is None:
            raise UsageError("the pipeline has no VAE to decode with; use output_type=latent.")
        if not self.owner and not self.plan.wraps.get("decode"):
            raise Left
        self.rank.observer.status(Status(Phase.DECODING))
        result = self.decode(latents, *args, **kwargs)
        if result is None:
            raise Left
        finite(result[0] if isinstance(result, tuple) else result.sample, "the decoded picture", self.rank.dtype)
        return result  # on all ranks that decoded: the pipeline may decode in several calls

    def _progress_bar(self, iterable: Any = None, total: int | None = None) -> StepLoop:
        """Replace the pipeline's progress bar."""
        self._clock.mark("encoded")
        done = partial(self._clock.mark, "denoised")
        return StepLoop(iterable, total or 0, self._before_step, self._step, self.rank.observer, done)

    def _stepped(self, result: Any) -> None:
        """The scheduler made a step."""
        self._state.branches.stepped()
        self._cancellation.stepped(result)

    def _before_step(self, done: int) -> None:
        """Leave the pipeline if the request is cancelled; else show the latents of the step before the last."""
        try:
            latents = self._cancellation.checkpoint()
        except Cancelled:
            materialized(self._cancellation.latents)  # as at the end: so all that was sent is received
            raise Left(failure=RequestCancelled()) from None
        if latents is not None and self.owner and done > 1:
            self.rank.observer.step_latents(done - 1, latents)

    def _step(self, done: int, steps: int) -> None:
        """Count a finished step of the pipeline."""
        self._state.step = done
        self.rank.observer.step_done(done, steps)

    def close(self) -> None:
        """Release process groups and buffers. The pipeline keeps its wraps and must not be used again."""
        for name, built in self._built.items():
            if built.close:
                self._owner_of(name).call("its close", built.close)
        self.rank.mesh.close()
        self.rank.observer.engine_closed()


__all__ = ["Engine", "Output"]
