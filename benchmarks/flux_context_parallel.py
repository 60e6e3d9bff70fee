"""Flux on two processes: ours with ``usp.ulysses=2``, the context parallelism of diffusers, and that of cache-dit, side
by side.

Model: Flux with random weights, 8 heads x 32, 2 double and 2 single blocks, 1,024 picture tokens + 64 text tokens,
fp32, one thread a process, gloo. All run the same unmodified pipeline. Measured: the denoising step (from the end of
one call of the scheduler to the end of the next; median of a run's steps, of the slower rank), and the whole call with
the encoding of the prompt, without loading. Variants run in turn, several rounds, each in fresh processes; a ratio is
taken within each round, and the median of the rounds is shown with its quartiles. The latents of every rank and round
are compared with those of plain diffusers.

    pip install --no-deps cache-dit einops
    python benchmarks/flux_context_parallel.py --steps 20 --rounds 11
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from xdit_core.testing.pool import Pool, PoolError

TEXT, SIDE = 64, 128
ARGUMENTS = {"height": SIDE, "width": SIDE, "guidance_scale": 3.5, "max_sequence_length": TEXT, "output_type": "latent"}
TOLERANCE = 1e-4  # of the largest number of the serial latents
Measured = tuple[float, float, torch.Tensor]  # seconds a step, seconds of the call, latents


def make_model(folder: Path) -> None:
    """The pipeline; its encoders and its VAE, which halves sides, are tiny."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel

    from xdit_core.testing.models import clip_tokenizer, tiny_clip, tiny_t5, tiny_vae

    torch.manual_seed(0)
    words = ["a", "red", "fox"]
    clip, (t5, tokenizer) = clip_tokenizer([" ".join(words)], length=12, vocab_size=600), tiny_t5(32, words)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=8,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=tiny_vae(64),
        text_encoder=tiny_clip(clip, 12, CLIPTextModel),
        tokenizer=clip,
        text_encoder_2=t5,
        tokenizer_2=tokenizer,
        transformer=transformer.eval(),
    ).save_pretrained(folder)


def timed(draw: Callable[[int], torch.Tensor], steps: int) -> Measured:
    """One call on this rank. The scheduler tells the time, since all variants leave it alone."""
    import torch.distributed as dist
    from diffusers import FlowMatchEulerDiscreteScheduler

    ends: list[float] = []
    step = FlowMatchEulerDiscreteScheduler.step

    def stamped(*args: Any, **kwargs: Any) -> Any:
        found = step(*args, **kwargs)
        ends.append(time.perf_counter())
        return found

    FlowMatchEulerDiscreteScheduler.step = stamped
    draw(2)
    ends.clear()
    if dist.is_initialized():
        dist.barrier()
    started = time.perf_counter()
    latents = draw(steps)
    seconds = time.perf_counter() - started
    if len(ends) != steps:
        raise RuntimeError(f"{len(ends)} calls of the scheduler for {steps} steps")
    return statistics.median(after - before for before, after in pairwise(ends)), seconds, latents


def with_pipeline(folder: str, steps: int, change: Callable[[Any], None]) -> Measured:
    """The pipeline of diffusers, with something done to it."""
    from diffusers import FluxPipeline

    torch.set_num_threads(1)
    torch.accelerator.device_count = lambda: 1  # diffusers asks it even where all is on the CPU
    pipe = FluxPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    change(pipe)

    def draw(steps: int) -> torch.Tensor:
        generator = [torch.Generator().manual_seed(0)]
        with torch.no_grad():
            return pipe("a red fox", generator=generator, num_inference_steps=steps, **ARGUMENTS)[0].clone()

    return timed(draw, steps)


def plain(folder: str, steps: int) -> Measured:
    """One process."""
    return with_pipeline(folder, steps, lambda pipe: None)


def diffusers_parallel(folder: str, steps: int) -> Measured:
    """``enable_parallelism`` of diffusers."""
    from diffusers import ContextParallelConfig

    return with_pipeline(
        folder, steps, lambda pipe: pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    )


def cache_dit_parallel(folder: str, steps: int) -> Measured:
    """cache-dit without its cache."""
    import cache_dit

    config = cache_dit.ParallelismConfig(ulysses_size=2)
    return with_pipeline(
        folder, steps, lambda pipe: cache_dit.enable_cache(pipe, cache_config=None, parallelism_config=config)
    )


def ours(folder: str, steps: int) -> Measured:
    """The plugin usp."""
    from xdit_core import Engine, make_plan

    torch.set_num_threads(1)
    values = {
        "model": "flux",
        "model.path": folder,
        "output_type": "latent",
        "usp.ulysses": 2,
        "usp.ring": 1,
        "device": "cpu",
    }
    values |= {"height": SIDE, "width": SIDE, "guidance": 3.5, "max_sequence_length": TEXT}
    engine = Engine(make_plan(["usp"], values))
    try:
        return timed(lambda steps: engine.generate("a red fox", steps=steps).latents, steps)
    finally:
        engine.close()


VARIANTS: dict[str, tuple[Callable[[str, int], Measured], int]] = {
    "plain diffusers, one process": (plain, 1),
    "xdit, usp.ulysses=2": (ours, 2),
    "diffusers, ulysses_degree=2": (diffusers_parallel, 2),
    "cache-dit, ulysses_size=2": (cache_dit_parallel, 2),
}


def quartiles(values: list[float]) -> str:
    """The median, and between what half of the values lie."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", default=None)
    args = parser.parse_args()
    if args.steps < 2 or args.rounds < 1:
        parser.error("a step is measured from the end of the one before: at least 2 steps, and at least 1 round")
    serial, mine, *_ = VARIANTS
    notes: dict[str, str] = {}
    if importlib.util.find_spec("cache_dit") is None:
        notes["cache-dit, ulysses_size=2"] = "not installed: pip install --no-deps cache-dit einops"
    step: dict[str, list[float]] = {name: [] for name in VARIANTS}
    call: dict[str, list[float]] = {name: [] for name in VARIANTS}
    off: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        for _ in range(args.rounds):  # in turn, so that a drift of the machine meets all alike
            for name, (function, world) in VARIANTS.items():
                if name in notes:
                    continue
                pool = Pool()  # fresh processes: what one library changes in torch must not meet the next
                try:
                    found = pool.run(function, folder, args.steps, world=world, timeout=3600)
                except PoolError as error:
                    if name in (serial, mine):
                        raise
                    notes[name] = "failed: " + str(error).strip().splitlines()[-1]
                    continue
                finally:
                    pool.close()
                step[name].append(max(a for a, _, _ in found))
                call[name].append(max(b for _, b, _ in found))
                if name == serial:
                    oracle = found[0][2]
                largest = (
                    torch.stack([(latents - oracle).abs().max() for _, _, latents in found]).max() / oracle.abs().max()
                )
                off[name] = (
                    torch.stack([torch.tensor(off.get(name, 0.0)), largest]).max().item()
                )  # NaN stays NaN, unlike with max()
    print(
        "| | ms a step | one process over it | it over xdit, a step | it over xdit, the call | largest error "
        "|\n|---|---|---|---|---|---|"
    )
    for name in VARIANTS:
        if name in notes:
            print(f"| {name} | {notes[name]} | | | | |")
            continue
        worth, beside, whole = (
            quartiles([x / y for x, y in zip(over, under, strict=True)])
            for over, under in ((step[serial], step[name]), (step[name], step[mine]), (call[name], call[mine]))
        )
        wrong = "" if off[name] <= TOLERANCE else " WRONG"
        print(
            f"| {name} | {1000 * statistics.median(step[name]):.1f} | {worth} | {beside} | {whole} | "
            f"{off[name]:.1e}{wrong} |"
        )
    if args.json:
        installed = {p: importlib.metadata.version(p) for p in ("torch", "diffusers")}
        if importlib.util.find_spec("cache_dit") is not None:
            installed["cache-dit"] = importlib.metadata.version("cache-dit")
        out = {"versions": installed, "seconds a step": step, "seconds a call": call, "error": off, "notes": notes}
        Path(args.json).write_text(json.dumps(out, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
