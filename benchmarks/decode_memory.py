"""What decoding one picture costs each rank in memory: the VAE of SD3 with random weights, serial and with
``parallel_vae``, on the CPU.

Peak growth of the resident memory of each process while it decodes, as Linux counts it. Prints a Markdown table and
writes nothing.

    python benchmarks/decode_memory.py --side 768 --ranks 1 2 4
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from diffusers import AutoencoderKL

from xdit_core import Axis, Mesh, Rank, Traffic
from xdit_core.testing.pool import Pool
from xdit_parallel_vae.strategy import ParallelVae

MIB = 1 << 20
CONFIG = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


def resident(field: str) -> int:
    """``VmRSS`` or, since it was last reset, ``VmHWM`` of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field + ":")).split()[1]) * 1024


def growth(side: int) -> int:
    """On each rank of the current group: decode one picture of ``side`` pixels; how many bytes were needed on top."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    vae, world = AutoencoderKL(**CONFIG).eval(), dist.get_world_size()
    del vae.encoder
    latents = torch.randn(1, 16, side // 8, side // 8)
    plan: Any = SimpleNamespace(axes=(Axis("x", world, Traffic.PER_LAYER),), run=SimpleNamespace())
    rank = Rank(plan, SimpleNamespace(), Mesh(plan.axes, "cpu"), torch.device("cpu"), torch.float32)  # type: ignore[arg-type]
    strategy = ParallelVae(None, None, rank)
    strategy.prepare(SimpleNamespace(vae=vae))
    with torch.no_grad():
        strategy.decode(vae.decode, latents[..., :world, :4])  # the first call loads libraries and connects the ranks
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = resident("VmRSS")
        strategy.decode(vae.decode, latents)
        after = resident("VmHWM")
    rank.mesh.close()
    return after - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=768, help="pixels, a multiple of 8")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    args = parser.parse_args()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 16)  # what is freed goes back at once and is not counted
    print(
        f"Decoding {args.side} x {args.side} pixels in float32:\n"
        "\n"
        "| ranks | peak growth of the largest rank (MiB) | of one rank's |"
    )
    print("|---|---|---|")
    first = 0
    for world in args.ranks:
        pool = Pool()
        most = max(pool.run(growth, args.side, world=world, timeout=1800))
        pool.close()
        first = first or most
        print(f"| {world} | {most / MIB:.0f} | {most / first:.2f} |", flush=True)


if __name__ == "__main__":
    main()
