"""The serial path on one GPU: plain diffusers, the engine, both compiled, and the attention kernels, as ratios within
one run.

Models with random weights in bfloat16: one of the size of SD3 medium (24 blocks, 24 heads x 64) and one of the size of
Flux.1 (19 + 38 blocks, 24 heads x 128), at 1024 x 1024. Text encoders and VAE are tiny; the denoising loop is measured.

    python benchmarks/gpu.py --model sd3 --steps 10 --repeats 3
    python benchmarks/gpu.py --model flux --steps 5 --repeats 3
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
KERNELS = ("flash", "cudnn", "efficient", "flash_attn", "flash_attn_3")


def pipeline(model: str, small: bool, device: str, dtype: torch.dtype) -> Any:
    """A tiny pipeline with a transformer of the real size."""
    from diffusers import FluxTransformer2DModel, SD3Transformer2DModel

    from helpers.models.tiny_images import flux
    from xdit_core.testing.models import tiny_sd3

    pipe = flux() if model == "flux" else tiny_sd3(text_tokens=77)
    config: dict[str, Any] = {**pipe.transformer.config, "sample_size": 128, "pos_embed_max_size": 192}
    cls: Any = SD3Transformer2DModel
    if model == "flux":
        cls, config = FluxTransformer2DModel, dict(pipe.transformer.config)
        config |= {"attention_head_dim": 128, "num_attention_heads": 24, "axes_dims_rope": (16, 56, 56)}
        config |= {"num_layers": 19, "num_single_layers": 38} if not small else {"num_attention_heads": 2}
    elif not small:
        config |= {
            "num_layers": 24,
            "num_attention_heads": 24,
            "attention_head_dim": 64,
            "caption_projection_dim": 1536,
        }
    with torch.device(device):
        torch.set_default_dtype(dtype)
        transformer = cls(**{k: v for k, v in config.items() if not k.startswith("_")}).eval()
        torch.set_default_dtype(torch.float32)
    pipe.register_modules(transformer=transformer)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device, dtype)


def folder_of(pipe: Any, model: str, where: Path) -> str:
    """A folder that a plan can be made from: the tiny checkpoint with the configuration of the large transformer."""
    from helpers.models.tiny_images import flux
    from xdit_core.testing.models import tiny_sd3

    (flux() if model == "flux" else tiny_sd3(text_tokens=77)).save_pretrained(where)
    (where / "transformer" / "config.json").write_text(json.dumps(dict(pipe.transformer.config), default=list))
    return str(where)


def arguments(pixels: int, steps: int) -> dict[str, Any]:
    """Of the pipeline's call."""
    size = {"height": pixels, "width": pixels, "num_inference_steps": steps}
    return {**size, "output_type": "latent", "max_sequence_length": 256}


def seconds(run: Any, device: str) -> float:
    """Wall time of a call, the device's work included."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    from xdit_core import Engine, PlanRefused, make_plan

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=("sd3", "flux"), default="sd3")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--pixels", type=int, default=None, help="of a side; default 1024 as the real VAE would have it"
    )
    parser.add_argument("--small", action="store_true", help="a small model, to see whether this script works")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    pixels = args.pixels or 256  # the tiny VAE has a factor of 2 where the real ones have 8: as many tokens as at 1024
    call = arguments(pixels, args.steps)
    with tempfile.TemporaryDirectory() as where:

        def plain(compiled: bool) -> Any:
            pipe = pipeline(args.model, args.small, args.device, dtype)
            if compiled:
                if not pipe.transformer._repeated_blocks:  # diffusers does not say which they are in SD3
                    pipe.transformer._repeated_blocks = ["JointTransformerBlock"]
                pipe.transformer.compile_repeated_blocks(fullgraph=True)
            return lambda: pipe("a red fox", **call)

        def ours(plugins: list[str], **settings: Any) -> Any:
            pipe = pipeline(args.model, args.small, args.device, dtype)
            path = folder_of(pipe, args.model, Path(where))
            values = {
                "model": args.model,
                "model.path": path,
                "device": args.device,
                "steps": args.steps,
                "output_type": "latent",
            }
            values |= {
                "height": pixels,
                "width": pixels,
                "max_sequence_length": 256,
                "dtype": str(dtype).removeprefix("torch."),
            }
            engine = Engine(
                make_plan(plugins, {**values, **{k.replace("_", ".", 1): v for k, v in settings.items()}}), pipe=pipe
            )
            return lambda: engine.generate("a red fox")

        cases: dict[str, Any] = {
            "plain diffusers": lambda: plain(False),
            "engine": lambda: ours([]),
            "diffusers, compile_repeated_blocks": lambda: plain(True),
            "engine, compile": lambda: ours(["compile"]),
        }
        cases |= {f"engine, flash.kernel={k}": (lambda k=k: ours(["flash"], flash_kernel=k)) for k in KERNELS}
        times: dict[str, list[float]] = {}
        first: dict[str, float] = {}
        for name, make in cases.items():
            try:
                run = make()
            except PlanRefused as refused:
                print(f"{name}: {refused}")
                continue
            first[name] = seconds(run, args.device)  # compiles
            times[name] = [seconds(run, args.device) for _ in range(args.repeats)]
            del run
            if args.device == "cuda":
                torch.cuda.empty_cache()
    base = statistics.median(times["plain diffusers"])
    print(f"| {args.model}, {args.steps} steps | seconds | of plain diffusers | first call |\n|---|---|---|---|")
    for name, values in times.items():
        middle = statistics.median(values)
        print(f"| {name} | {middle:.3f} | {middle / base:.3f} | {first[name]:.1f} |")


if __name__ == "__main__":
    main()
