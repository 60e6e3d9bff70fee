"""What a step costs the host: microseconds a block and launched operations a step, beside plain diffusers.

On a GPU a block takes half a millisecond, so the time in which Python launches it counts. The models here have the
number of blocks of the real ones and are so narrow that their kernels take no time. One rank of ``N`` runs, on torch's
``fake`` process group, on which collectives do nothing: its pictures are wrong, its host path is the real one.

Time: median over rounds of (a request of 2 n steps less one of n steps) / n, all settings in turn within each round.
Counts are those of one step and exact: operations below autograd (``TorchDispatchMode``), collectives among them.

    python benchmarks/host_path.py --models sd3 flux --rounds 5
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from helpers.host_path import collectives, one_rank, operations

# name: plugins, settings, ranks
STRATEGIES: dict[str, tuple[list[str], dict[str, Any], int]] = {
    "engine": ([], {}, 1),
    "usp, one rank": (["usp"], {"usp.ulysses": 1, "usp.ring": 1}, 1),
    "ulysses 8": (["usp"], {"usp.ulysses": 8, "usp.ring": 1}, 8),
    "ring 8": (["usp"], {"usp.ulysses": 1, "usp.ring": 8}, 8),
    "ulysses 4 x ring 2": (["usp"], {"usp.ulysses": 4, "usp.ring": 2}, 8),
    "tp 8": (["tp"], {"tp.degree": 8}, 8),
    "distrifusion 8": (["distrifusion"], {"distrifusion.degree": 8}, 8),
    "pipefusion 8": (["pipefusion"], {"pipefusion.stages": 8, "pipefusion.patches": 8}, 8),
    "pipefusion 4 x ulysses 2": (
        ["pipefusion", "usp"],
        {"pipefusion.stages": 4, "pipefusion.patches": 4, "usp.ulysses": 2, "usp.ring": 1},
        8,
    ),
}
BLOCKS = {"sd3": 24, "flux": 57, "wan": 30, "qwen_image": 60}


def make(model: str) -> Any:
    """A pipeline of the real depth, 8 heads wide."""
    from helpers.models import tiny_images, tiny_videos
    from xdit_core.testing.models import tiny_sd3

    if model == "sd3":
        pipe = tiny_sd3(layers=BLOCKS["sd3"], heads=8, head_dim=8, sample_size=32, text_tokens=16)
    elif model == "flux":
        pipe = tiny_images.flux()
        deeper(pipe, num_layers=19, num_single_layers=38, num_attention_heads=8)
    elif model == "wan":
        pipe = tiny_videos.wan(layers=BLOCKS["wan"])
        deeper(pipe, num_attention_heads=8)
    else:
        pipe = tiny_images.qwen_image(layers=BLOCKS["qwen_image"])
        deeper(pipe, num_attention_heads=8)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def deeper(pipe: Any, **changes: Any) -> None:
    """Give a pipeline a transformer with some values of its configuration changed."""
    old = pipe.transformer
    config = {k: v for k, v in dict(old.config).items() if not k.startswith("_")}
    pipe.register_modules(transformer=type(old)(**{**config, **changes}).eval())


def plain(model: str, pipe: Any) -> Callable[[int], Any]:
    """Requests of some steps to plain diffusers."""
    return lambda steps: pipe("a red fox", num_inference_steps=steps, output_type="latent", **sizes(model))


def sizes(model: str) -> dict[str, Any]:
    """Arguments of the pipeline besides the prompt and steps: no guidance, 256 picture tokens or more."""
    size = {"height": 64, "width": 64}
    return {
        "sd3": {"guidance_scale": 1.0, "max_sequence_length": 16, "height": 32, "width": 32},
        "flux": {"guidance_scale": 3.5, "max_sequence_length": 16, "height": 32, "width": 32},
        "wan": {"guidance_scale": 1.0, "max_sequence_length": 16, "num_frames": 5, **size},
        "qwen_image": {"true_cfg_scale": 1.0, "max_sequence_length": 16, **size},
    }[model]


def ours(model: str, folder: str, name: str, rank: int, stack: ExitStack) -> Callable[[int], Any]:
    """Requests of some steps to one rank of a plan."""
    plugins, values, world = STRATEGIES[name]
    names = {"guidance_scale": "guidance", "true_cfg_scale": "guidance", "num_frames": "frames"}
    arguments = {names.get(name, name): value for name, value in sizes(model).items()}
    settings = {"model": model, "model.path": folder, **arguments, **values}
    return one_rank(plugins, settings, world, rank if world > 1 else 0, stack)


def seconds(request: Callable[[int], Any], n: int) -> float:
    """Of one step."""
    marks = [time.process_time()]
    for steps in (2 * n, n):
        request(steps)
        marks.append(time.process_time())
    return ((marks[1] - marks[0]) - (marks[2] - marks[1])) / n


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["sd3", "flux"], choices=list(BLOCKS))
    parser.add_argument("--strategies", nargs="*", default=list(STRATEGIES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rank", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| model | setting | ms a step | of plain | us a block above plain | operations | of plain | collectives |")
    print("|---|---|--:|--:|--:|--:|--:|--:|")
    for model in args.models:
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
            pipe = make(model)
            pipe.save_pretrained(folder)
            base = plain(model, pipe)
            base(2)
            whole = sum(operations(base).values())
            print(f"| {model} | plain diffusers | | 1 | | {whole} | 1 | |", flush=True)
            for name in args.strategies:
                with ExitStack() as stack:
                    try:
                        request = ours(model, folder, name, args.rank, stack)
                        request(2)
                    except Exception as error:
                        print(f"| {model} | {name} | {type(error).__name__}: {error} |")
                        continue
                    counted = operations(request)
                    pairs = [(seconds(base, args.steps), seconds(request, args.steps)) for _ in range(args.rounds)]
                    there, here = (statistics.median(p) for p in zip(*pairs, strict=True))
                    sent = collectives(counted)
                    print(
                        f"| {model} | {name} | {here * 1e3:.1f} | {here / there:.2f} | "
                        f"{(here - there) / BLOCKS[model] * 1e6:.0f} | {sum(counted.values())} | "
                        f"{sum(counted.values()) / whole:.2f} | {sent} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
