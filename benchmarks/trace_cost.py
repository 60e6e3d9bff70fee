"""What ``--trace`` costs, and that without it nothing is paid.

A small SD3-shaped random model (8 blocks, 256 picture tokens, 256 wide), where a call of Python counts for much, on two
processes with USP and with PipeFusion. In turn: traced off, off once more (what the noise is), and on.

    python benchmarks/trace_cost.py --steps 40 --rounds 7
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from xdit_core.testing.pool import Pool

PLANS = MappingProxyType(
    {
        "usp.ulysses=2": (["usp"], {"usp.ulysses": 2, "usp.ring": 1}),
        "pipefusion.stages=2": (["pipefusion"], {"pipefusion.stages": 2, "pipefusion.patches": 4}),
    }
)
VARIANTS = ("off", "off again", "on")


def seconds(
    folder: str, plugins: list[str], settings: dict[str, Any], steps: int, rounds: int
) -> tuple[dict[str, list[float]], int]:
    """Wall time of the request with each variant, in turn, and the spans of one traced request."""
    import torch.distributed as dist

    from xdit_core import Engine, make_plan

    torch.set_num_threads(1)
    base = {
        "model": "sd3",
        "model.path": folder,
        "guidance": 1.0,
        "max_sequence_length": 0,
        "output_type": "latent",
        "device": "cpu",
    }
    engines = {
        name: Engine(make_plan(plugins, {**base, **settings, "steps": steps, "trace": name == "on"}))
        for name in VARIANTS
    }
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    spans = 0
    for turn in range(rounds + 1):  # the first warms up
        for name, engine in engines.items():
            dist.barrier()
            started = time.perf_counter()
            engine.generate("a red fox")
            if turn:
                times[name].append(time.perf_counter() - started)
            if engine.trace:
                spans = len(engine.trace.spans)
                engine.trace.spans.clear()
    for engine in engines.values():
        engine.close()
    return times, spans


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    from xdit_core.testing.models import tiny_sd3

    print("| | off (s) | off again | on | spans of a rank |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        tiny_sd3(layers=8, heads=4, head_dim=64, sample_size=32, text_tokens=77).save_pretrained(Path(folder))
        pool = Pool()
        for name, (plugins, settings) in PLANS.items():
            times, spans = pool.run(seconds, folder, plugins, settings, args.steps, args.rounds, world=2, timeout=1800)[
                0
            ]
            middle = {variant: statistics.median(values) for variant, values in times.items()}
            ratios = [f"{middle[variant] / middle['off']:.3f}x" for variant in VARIANTS[1:]]
            print(f"| `{name}` | {middle['off']:.3f} | {ratios[0]} | {ratios[1]} | {spans} |", flush=True)
        pool.close()


if __name__ == "__main__":
    main()
