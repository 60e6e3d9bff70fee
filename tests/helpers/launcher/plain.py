"""A plain torch.distributed script that fails as the plugin ``faulty`` does, to see what other launchers make of it.

torchrun ... plain.py HOW
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).with_name("faulty")))
from xdit_faulty import fail


def main(how: str) -> None:
    dist.init_process_group("gloo")
    for step in range(3000):
        time.sleep(0.05)
        if step == 20 and dist.get_rank() == 1 and how != "none":
            fail(how)
        dist.all_reduce(torch.ones(4))
        if step == 20:
            Path(f"reached{dist.get_rank()}").touch()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
