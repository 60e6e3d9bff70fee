"""One rank of one run: load the pipeline, weave the strategies in, answer requests.

The pipeline and its scheduler run as diffusers ships them; what changes is what ``transformer(...)`` and ``vae.decode(...)`` do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from xdit_core.attention import AttentionPoint
from xdit_core.chain import nest
from xdit_core.errors import PlanRefused, PluginError, UsageError, XditError
from xdit_core.forward import ForwardPoint, remembering
from xdit_core.lazy import materialized
from xdit_core.loading import load_pipeline
from xdit_core.mesh import Mesh
from xdit_core.plan import Plan, check_run, check_size
from xdit_core.rank import Rank, ignore
from xdit_core.records import Built
from xdit_core.registry import Registry
from xdit_core.settings import RunSettings, build
from xdit_core.trunk import Trunk, replace_blocks

# What may differ from request to request; everything else is decided by the plan.
PER_REQUEST = frozenset(
    ("negative", "steps", "guidance", "height", "width", "images", "seed", "output_type", "max_sequence_length")
)


class _Elsewhere(Exception):
    """Leaves the pipeline on a rank whose output another rank makes."""


@dataclass
class Output:
    """What one prompt gave.

    Args:
        images: PIL pictures; None on ranks that do not own the output.
        latents: ``[n, C, h, w]`` if latents were asked for, on every rank.
        seconds: wall time of encode, denoise and decode.
    """

    prompt: str
    images: list[Any] | None = None
    latents: torch.Tensor | None = None
    seconds: dict[str, float] = field(default_factory=dict)


Progress = Callable[[int, int], None]


class Engine:
    """The frozen strategies around one pipeline.

    Args:
        plan: what to run. With more than one rank the default process group must be initialized and have that many ranks.
        registry: where the plugins come from, by default the installed ones.
        pipe: a loaded diffusers pipeline to use instead of loading the plan's; it is changed in place.
        progress: told ``(step, steps)`` after each step.
        doing: told what the rank is about to wait for.
    """

    def __init__(
        self,
        plan: Plan,
        registry: Registry | None = None,
        pipe: Any = None,
        progress: Progress | None = None,
        doing: Callable[[str], None] = ignore,
    ) -> None:
        registry = registry or Registry()
        registry.select(plan.plugins)
        spec, _ = registry.model(plan.model)
        self.plan, self.progress = plan, progress
        started = time.perf_counter()
        device = torch.device(plan.run.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = getattr(torch, plan.run.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
        if device.type == "cuda":
            device = torch.device("cuda", torch.cuda.current_device())
        mesh = Mesh(plan.axes, device.type)
        self.rank = Rank(plan, spec, mesh, device, dtype, doing=doing)
        doing("loading the model")
        self.pipe = pipe or load_pipeline(spec, Path(plan.folder), self.rank.blocks, device, dtype)
        self.rank.pipe = self.pipe
        if plan.run.scheduler:
            self.pipe.scheduler = scheduler_named(plan.run.scheduler, self.pipe.scheduler)
        self.rank.now.shard = shard_index(plan, mesh)
        self.owner = mesh.rank == 0
        self._weave(registry, spec)
        self.load_seconds = time.perf_counter() - started
        self._marks: dict[str, float] = {}
        self._broken = False

    def _weave(self, registry: Registry, spec: Any) -> None:
        """Build every strategy and nest its wraps in the plan's order."""
        plan = self.plan
        classes = registry.call("xdit_settings", {name: {} for name in plan.plugins})
        own = {name: build(classes.get(name), name + ".", plan.values) for name in plan.plugins}
        built: dict[str, Built] = registry.call(
            "xdit_build", {name: {"settings": own[name], "rank": self.rank} for name in plan.plugins}
        )
        chains: dict[str, list[Any]] = {}
        for point, pairs in plan.wraps.items():
            for level, name in pairs:
                wrap = built[name].wraps.get(f"{point}/{level}") if name in built else None
                if wrap is None:
                    raise PluginError(f"plugin {name} declares a wrap at {point}/{level} but xdit_build gave none.")
                chains.setdefault(point, []).append(wrap)
        for phase, name in plan.transforms:
            change = built[name].transforms.get(phase) if name in built else None
            if change is None:
                raise PluginError(f"plugin {name} declares a transform in the phase {phase} but xdit_build gave none.")
            change(self.pipe)
        now, denoiser = self.rank.now, getattr(self.pipe, spec.denoiser)
        self.once = remembering(denoiser, self.rank)
        attention = AttentionPoint(now, chains.get("attention", []))
        self.trunk = replace_blocks(denoiser, spec, lambda blocks: Trunk(blocks, spec, now, attention, chains.get("trunk", [])))
        self.forward = ForwardPoint(self.rank, denoiser, chains.get("forward", []))
        self.decode: Callable[..., Any] | None = None
        if getattr(self.pipe, "vae", None) is not None:
            self.decode = nest(chains.get("decode", []), self.pipe.vae.decode)
            self.pipe.vae.decode = self._decode
        self.pipe.progress_bar = self._progress_bar
        self._generate: Callable[[dict[str, Any]], Output] = nest(chains.get("request", []), self._call_pipeline)
        self._built = tuple(built.values())

    @torch.no_grad()
    def generate(self, prompt: str, **changes: Any) -> Output:
        """One prompt, ``images`` pictures; every rank of the plan must call it with the same arguments.

        Args:
            prompt: what to draw.
            changes: any of ``PER_REQUEST``, and ``call={...}`` with further arguments of the pipeline's ``__call__``.

        Raises:
            UsageError: an argument that is unknown or decided by the plan.
            PlanRefused: a value that no run can have.
            XditError: an earlier request failed on several ranks, which then no longer agree on what was sent.
        """
        if self._broken:
            raise XditError("an earlier request failed, and the ranks no longer agree on what was sent; make a new Engine.")
        more = changes.pop("call", {})
        unknown = sorted(set(changes) - PER_REQUEST)
        if unknown:
            raise UsageError(
                f"generate takes no {', '.join(unknown)}; it takes {', '.join(sorted(PER_REQUEST))}, and other arguments of the "
                "pipeline in call={...}; the rest is decided by the plan."
            )
        run = dataclasses.replace(self.plan.run, **changes)
        problems = check_run(run) + check_size(run, self.plan.facts)
        if problems:
            raise PlanRefused(problems)
        arguments = {**call_arguments(run, self.rank.spec, self.pipe), **more, "prompt": prompt}
        self.rank.slow.clear()
        self.forward.begin()
        for module in self.once:
            module.begin()
        for built in self._built:
            if built.begin:
                built.begin()
        self._marks = {"start": time.perf_counter()}
        self.rank.doing("encoding the prompt")
        self._broken = self.plan.world > 1
        with torch.random.fork_rng(devices=[self.rank.device] if self.rank.device.type == "cuda" else []):
            torch.manual_seed(run.seed % 2**63)  # stochastic schedulers draw from the default generator
            output = self._generate(arguments)
        for built in self._built:
            if built.end:
                built.end()
        self._broken = False
        output.seconds = self._seconds()
        return output

    def _call_pipeline(self, arguments: Mapping[str, Any]) -> Output:
        output = Output(arguments["prompt"])
        try:
            result = self.pipe(**arguments)[0]
        except _Elsewhere:
            self.pipe.maybe_free_model_hooks()
            return output
        if arguments.get("output_type") == "latent":
            output.latents = materialized(result)
        else:
            output.images = list(result)
        return output

    def _decode(self, latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Stands for ``vae.decode``: all ranks bring the latents together, the owner decodes."""
        self.rank.doing("gathering the latents")
        latents = materialized(latents)
        self._mark("denoised")
        if not self.owner and not self.plan.wraps.get("decode"):
            raise _Elsewhere
        self.rank.doing("decoding")
        if self.decode is None:
            raise UsageError("the pipeline has no VAE to decode with; use output_type=latent.")
        return self.decode(latents, *args, **kwargs)

    @contextlib.contextmanager
    def _progress_bar(self, iterable: Any = None, total: int | None = None) -> Iterator[Any]:
        """Stands for the pipeline's progress bar."""
        self._mark("encoded")
        bar = _Bar(total or 0, self.progress, self.rank.doing)
        yield bar
        self._mark("denoised")

    def _mark(self, name: str) -> None:
        if self.rank.device.type == "cuda":
            torch.cuda.synchronize()
        self._marks[name] = time.perf_counter()

    def _seconds(self) -> dict[str, float]:
        m, end = self._marks, time.perf_counter()
        encoded = m.get("encoded", m["start"])
        denoised = m.get("denoised", end)
        return {"encode": encoded - m["start"], "denoise": denoised - encoded, "decode": end - denoised}

    def close(self) -> None:
        """Release process groups and buffers; the pipeline stays woven and must not be used again."""
        for built in self._built:
            if built.close:
                built.close()
        self.rank.mesh.close()


class _Bar:
    """What the pipeline's loop calls after each step."""

    def __init__(self, total: int, progress: Progress | None, doing: Callable[[str], None]) -> None:
        self.total, self.n, self._progress, self._doing = total, 0, progress, doing
        doing(f"step 1 of {total}")

    def update(self, n: int = 1) -> None:
        """One step is done."""
        self.n += n
        self._doing(f"step {min(self.n + 1, self.total)} of {self.total}")
        if self._progress:
            self._progress(self.n, self.total)

    def set_postfix(self, *args: Any, **kwargs: Any) -> None:
        """Accepted for pipelines that show more."""


def shard_index(plan: Plan, mesh: Mesh) -> int:
    """This rank's coordinate over all axes that divide the tokens, outermost first."""
    index = 0
    for axis in plan.axes:
        if axis.shards_tokens:
            index = index * (axis.degree or 1) + mesh.index(axis.name)
    return index


def call_arguments(run: RunSettings, spec: Any, pipe: Any) -> dict[str, Any]:
    """The shared settings as arguments of the pipeline's ``__call__``."""
    named = {
        "steps": "num_inference_steps",
        "guidance": "guidance_scale",
        "negative": "negative_prompt",
        "height": "height",
        "width": "width",
        "images": "num_images_per_prompt",
        "max_sequence_length": "max_sequence_length",
        **spec.call,
    }
    found = {named[key]: getattr(run, key) for key in named if getattr(run, key) is not None and named[key]}
    generators = [torch.Generator("cpu").manual_seed((run.seed + i) % 2**64) for i in range(run.images)]
    return {**found, "generator": generators, "output_type": "pil" if run.output_type == "image" else "latent"}


def scheduler_named(name: str, current: Any) -> Any:
    """A scheduler of another class with the configuration of the current one.

    Raises:
        UsageError: diffusers has no such class.
    """
    import diffusers

    cls: Any = getattr(diffusers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, diffusers.SchedulerMixin)):
        same = ", ".join(c.__name__ for c in current.compatibles) if hasattr(current, "compatibles") else "see diffusers"
        raise UsageError(f"scheduler={name} is no scheduler class of diffusers; this model's compatible ones: {same}.")
    made: Any = cls
    return made.from_config(current.config)


__all__ = ["Engine", "Output"]
