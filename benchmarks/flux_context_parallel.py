"""Flux on two processes: ours with ``usp.ulysses=2``, the context parallelism of diffusers, and that of cache-dit, side by side.

Model: Flux with random weights, 8 heads x 32, 2 double and 2 single blocks, 1,024 picture tokens + 64 text tokens, fp32, one thread a
process, gloo. All run the same unmodified pipeline; the time is that of its whole call, encoding of the prompt included, without loading.
Variants run in turn, several rounds; the latents of each are compared with those of plain diffusers.

    pip install --no-deps cache-dit einops
    python benchmarks/flux_context_parallel.py --steps 20 --rounds 5
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from xdit_core.testing.pool import Pool

TEXT, SIDE = 64, 128
ARGUMENTS = {"height": SIDE, "width": SIDE, "guidance_scale": 3.5, "max_sequence_length": TEXT, "output_type": "latent"}


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


def timed(draw: Callable[[int], torch.Tensor], steps: int) -> tuple[float, torch.Tensor]:
    """Seconds of one call on this rank, and its latents."""
    import torch.distributed as dist

    draw(2)
    if dist.is_initialized():
        dist.barrier()
    started = time.perf_counter()
    latents = draw(steps)
    return time.perf_counter() - started, latents


def with_pipeline(folder: str, steps: int, change: Callable[[Any], None]) -> tuple[float, torch.Tensor]:
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


def plain(folder: str, steps: int) -> tuple[float, torch.Tensor]:
    """One process."""
    return with_pipeline(folder, steps, lambda pipe: None)


def diffusers_parallel(folder: str, steps: int) -> tuple[float, torch.Tensor]:
    """``enable_parallelism`` of diffusers."""
    from diffusers import ContextParallelConfig

    return with_pipeline(
        folder, steps, lambda pipe: pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    )


def cache_dit_parallel(folder: str, steps: int) -> tuple[float, torch.Tensor]:
    """cache-dit without its cache."""
    import cache_dit

    config = cache_dit.ParallelismConfig(ulysses_size=2)
    return with_pipeline(folder, steps, lambda pipe: cache_dit.enable_cache(pipe, cache_config=None, parallelism_config=config))


def ours(folder: str, steps: int) -> tuple[float, torch.Tensor]:
    """The plugin usp."""
    from xdit_core import Engine, make_plan

    torch.set_num_threads(1)
    values = {"model": "flux", "model.path": folder, "output_type": "latent", "usp.ulysses": 2, "usp.ring": 1, "device": "cpu"}
    values |= {"height": SIDE, "width": SIDE, "guidance": 3.5, "max_sequence_length": TEXT}
    engine = Engine(make_plan(["usp"], values))
    try:
        return timed(lambda steps: engine.generate("a red fox", steps=steps).latents, steps)
    finally:
        engine.close()


VARIANTS: dict[str, tuple[Callable[[str, int], tuple[float, torch.Tensor]], int]] = {
    "plain diffusers, one process": (plain, 1),
    "xdit, usp.ulysses=2": (ours, 2),
    "diffusers, ulysses_degree=2": (diffusers_parallel, 2),
    "cache-dit, ulysses_size=2": (cache_dit_parallel, 2),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", default=None)
    args = parser.parse_args()
    variants = dict(VARIANTS)
    if importlib.util.find_spec("cache_dit") is None:
        del variants["cache-dit, ulysses_size=2"]
        print("cache-dit is not installed: pip install --no-deps cache-dit einops")
    times: dict[str, list[float]] = {name: [] for name in variants}
    latents: dict[str, torch.Tensor] = {}
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        for _ in range(args.rounds):  # in turn, so that a drift of the machine meets all alike
            for name, (function, world) in variants.items():
                pool = Pool()  # fresh processes: what one library changes in torch must not meet the next
                found = pool.run(function, folder, args.steps, world=world, timeout=3600)
                pool.close()
                times[name].append(max(seconds for seconds, _ in found))
                latents[name] = found[0][1]
    serial = latents["plain diffusers, one process"]
    base, mine = (statistics.median(times[name]) for name in list(variants)[:2])
    print(
        "| | median s | of one process | xdit is faster by | largest difference of the latents from serial |\n|---|---|---|---|---|"
    )
    for name, values in times.items():
        middle, off = statistics.median(values), (latents[name] - serial).abs().max().item() / serial.abs().max().item()
        print(f"| {name} | {middle:.2f} | {base / middle:.2f}x | {middle / mine:.2f}x | {off:.1e} |")
    if args.json:
        Path(args.json).write_text(json.dumps({"seconds": times}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
