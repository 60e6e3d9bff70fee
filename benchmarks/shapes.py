"""The figures of the README, as ratios within one run, on an SD3-shaped random model.

Model: 8 blocks, 16 heads x 64, 1,024 picture tokens + 77 text tokens, fp32, one thread a process. Measured: plain
diffusers, the engine without a plugin, USP on two processes, PipeFusion (M=4, W=1) on two processes; and the bytes sent
by each. Two plain runs at once, which share nothing and say nothing to each other, show what a second process is worth
on this machine at best.

    python benchmarks/shapes.py --steps 20 --repeats 3
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from xdit_core.testing.pool import Pool

WIDTH, LAYERS, TOKENS, TEXT = 1024, 8, 1024, 77
STRATEGIES: dict[str, tuple[list[str], dict[str, Any], int]] = {
    "engine, no plugin": ([], {}, 1),
    "usp.ulysses=2": (["usp"], {"usp.ulysses": 2, "usp.ring": 1}, 2),
    "usp.ring=2": (["usp"], {"usp.ulysses": 1, "usp.ring": 2}, 2),
    "pipefusion.stages=2, M=4, W=1": (["pipefusion"], {"pipefusion.stages": 2, "pipefusion.patches": 4}, 2),
}

CEILING = "two plain runs at once, time of one"


def make_model(folder: Path) -> None:
    """An SD3-shaped pipeline; its text encoders are tiny, only the transformer is measured."""
    from xdit_core.testing.models import tiny_sd3

    pipe = tiny_sd3(layers=LAYERS, heads=16, head_dim=64, sample_size=64, text_tokens=TEXT)
    pipe.save_pretrained(folder)


def diffusers_seconds(folder: str, steps: int) -> float:
    """Wall time of the denoising loop of the plain pipeline."""
    from diffusers import StableDiffusion3Pipeline

    torch.set_num_threads(1)
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    pipe.set_progress_bar_config(disable=True)
    arguments = {"guidance_scale": 1.0, "max_sequence_length": 0, "output_type": "latent"}
    pipe("warm", num_inference_steps=1, **arguments)
    started = time.perf_counter()
    pipe("a red fox", num_inference_steps=steps, **arguments)
    return time.perf_counter() - started


def engine_seconds(
    folder: str, plugins: list[str], settings: dict[str, Any], steps: int
) -> tuple[float, dict[str, int]]:
    """Wall time of the same request through the engine on every rank, and the bytes this rank sent."""
    import torch.distributed as dist

    from xdit_core import Engine, make_plan

    torch.set_num_threads(1)
    values = {"model": "sd3", "model.path": folder, "guidance": 1.0, "max_sequence_length": 0, "output_type": "latent"}
    engine = Engine(make_plan(plugins, {**values, **settings, "steps": steps}))
    engine.generate("warm", steps=2)
    engine.rank.sent.clear()
    if dist.is_initialized():
        dist.barrier()
    started = time.perf_counter()
    engine.generate("a red fox")
    seconds = time.perf_counter() - started
    engine.close()
    return seconds, dict(engine.rank.sent)


def table(sent: dict[str, int], steps: int) -> list[str]:
    """Bytes a step and axis, in units of tokens x hidden, picture tokens only in the unit."""
    unit = TOKENS * WIDTH * 4 * steps
    return [f"{axis} {count / unit:.3f}" for axis, count in sorted(sent.items())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="", help="part of a strategy's name")
    parser.add_argument("--json", default=None)
    args = parser.parse_args()
    times: dict[str, list[float]] = {"plain diffusers": []}
    sent: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        pool = Pool()
        for _ in range(args.repeats):  # in turn, so that a drift of the machine meets all alike
            times["plain diffusers"] += pool.run(diffusers_seconds, folder, args.steps, world=1, timeout=3600)
            together = pool.run(diffusers_seconds, folder, args.steps, world=2, timeout=3600)
            times.setdefault(CEILING, []).append(max(together) / 2)
            for name, (plugins, settings, world) in STRATEGIES.items():
                if args.only in name:
                    results = pool.run(engine_seconds, folder, plugins, settings, args.steps, world=world, timeout=3600)
                    times.setdefault(name, []).append(max(seconds for seconds, _ in results))
                    sent[name] = results[0][1]
        pool.close()
    base = statistics.median(times["plain diffusers"])
    print(
        "| | median s | against plain diffusers | bytes sent by rank 0 a step, in tokens x hidden |\n|---|---|---|---|"
    )
    for name, values in times.items():
        middle = statistics.median(values)
        print(
            f"| {name} | {middle:.2f} | {base / middle:.2f}x ({middle / base:.3f}) | "
            f"{', '.join(table(sent.get(name, {}), args.steps))} |"
        )
    if args.json:
        Path(args.json).write_text(json.dumps({"seconds": times, "sent": sent}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
