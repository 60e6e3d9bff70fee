"""Does the emoji model draw what it is asked for? Retrieval of names among all training pictures.

For names drawn at random, with fixed seeds, a generated picture counts as right when its nearest neighbour (L2 between
32 x 32 thumbnails, mirrored allowed) among all training pictures is the named one.

    python -m xdit_emoji.training.evaluate --pipeline models/xdit_emoji/pipeline --sheet docs/pictures/emoji.png
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

from xdit_core import Engine, make_plan
from xdit_emoji.training.data import chosen_names, load, sheet

Draw = Callable[[str, int], torch.Tensor]


def thumbnails(pictures: torch.Tensor) -> torch.Tensor:
    """uint8 ``[n, 3, h, w]`` to float ``[n, 3 * 32 * 32]``."""
    return F.interpolate(pictures.float() / 255, size=(32, 32), mode="area").flatten(1)


def nearest(picture: torch.Tensor, known: torch.Tensor) -> int:
    """Index of the training picture that is nearest to a uint8 picture ``[3, h, w]`` or to its mirror image."""
    both = thumbnails(torch.stack((picture, picture.flip(-1))))
    return int(torch.cdist(both, known).min(dim=0).values.argmin())


def to_tensor(image: Image.Image) -> torch.Tensor:
    """A PIL picture as uint8 ``[3, h, w]``."""
    data = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
    return data.view(image.height, image.width, 3).permute(2, 0, 1)


def questions(names: Sequence[str], count: int, seed: int = 0) -> list[tuple[str, int]]:
    """Names drawn at random without repetition, each with the seed of its noise."""
    drawn = random.Random(seed).sample(sorted(names), min(count, len(names)))
    return [(name, 1000 + i) for i, name in enumerate(drawn)]


def score(
    draw: Draw, names: Sequence[str], pictures: torch.Tensor, asked: Sequence[tuple[str, int]]
) -> tuple[int, list[str]]:
    """How many are right, and a line for each that is wrong."""
    known, right, wrong = thumbnails(pictures), 0, []
    for name, seed in asked:
        found = names[nearest(draw(name, seed), known)]
        right += found == name
        if found != name:
            wrong.append(f"{name} -> {found}")
    return right, wrong


def serial(folder: str | None, **settings: object) -> Engine:
    """The engine without a strategy on the bundled or another checkpoint."""
    values = {"model": "emoji", **({"model.path": folder} if folder else {}), **settings}
    return Engine(make_plan([], values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pipeline", default=None, help="folder of the checkpoint; default: the bundled one")
    parser.add_argument("--names", default=None, help="a file of names, or 'all'; default: names.txt")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=None)
    parser.add_argument("--sheet", default=None, help="write the pictures here")
    args = parser.parse_args()
    names, pictures = load(None if args.names == "all" else chosen_names(args.names))
    settings = {"steps": args.steps, **({} if args.guidance is None else {"guidance": args.guidance})}
    engine, drawn = serial(args.pipeline, **settings), []
    started = time.monotonic()

    def draw(name: str, seed: int) -> torch.Tensor:
        images = engine.generate(name, seed=seed).images
        if images is None:
            raise RuntimeError("this rank does not own the output")
        drawn.append(to_tensor(images[0]))
        return drawn[-1]

    asked = questions(names, args.count)
    right, wrong = score(draw, names, pictures, asked)
    print("\n".join(wrong))
    print(
        f"{right} of {len(asked)} right among {len(names)}; {(time.monotonic() - started) / len(asked):.2f} s a picture"
    )
    if args.sheet:
        Path(args.sheet).parent.mkdir(parents=True, exist_ok=True)
        sheet(torch.stack(drawn), 10).save(args.sheet)


if __name__ == "__main__":
    main()
