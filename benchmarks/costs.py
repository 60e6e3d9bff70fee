"""What each strategy sends and holds, counted, against the table of the methods; writes ``docs/measured/costs.md``.

Model: an SD3 with random weights, 8 blocks, 8 heads x 8, 1,024 picture tokens and 8 text tokens, two steps without
guidance. Bytes are those of the second step, all ranks together; parameters and buffers are those of the rank that
holds most.

    python benchmarks/costs.py
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from xdit_core.testing.pool import Pool

LAYERS, HEADS, DIM, SIDE, TEXT = 8, 8, 8, 64, 8
HIDDEN, TOKENS = HEADS * DIM, (SIDE // 2) ** 2
DEGREES = (2, 4, 8)


def settings(n: int) -> dict[str, tuple[list[str], dict[str, Any]]]:
    """Each strategy alone on ``n`` ranks."""
    return {
        "tp": (["tp"], {"tp.degree": n}),
        "distrifusion": (["distrifusion"], {"distrifusion.degree": n}),
        "usp.ring": (["usp"], {"usp.ulysses": 1, "usp.ring": n}),
        "usp.ulysses": (["usp"], {"usp.ulysses": n, "usp.ring": 1}),
        "pipefusion": (["pipefusion"], {"pipefusion.stages": n, "pipefusion.patches": n}),
    }


def measured(folder: str, plugins: list[str], values: dict[str, Any]) -> tuple[dict[str, int], int, int]:
    """On every rank: bytes sent in the second step by axis, parameter bytes of the blocks, bytes of kept keys and
    values."""
    from xdit_core import Engine, make_plan

    torch.set_num_threads(1)
    base = {
        "model": "sd3",
        "model.path": folder,
        "guidance": 1.0,
        "max_sequence_length": 0,
        "output_type": "latent",
        "steps": 3,
    }
    marks, kept = [], [0]

    def look(step: int, steps: int) -> None:
        marks.append(dict(engine.rank.sent))
        if step == 2:
            kept[0] = held(engine)

    engine = Engine(make_plan(plugins, {**base, "device": "cpu", **values}), progress=look)
    local = [p for n, p in engine.pipe.transformer.named_parameters() if "blocks" in n]
    engine.generate("a red fox")
    engine.close()
    sent = {axis: count - marks[0].get(axis, 0) for axis, count in marks[1].items()}
    return sent, sum(p.nbytes for p in local), kept[0]


def held(engine: Any) -> int:
    """Bytes of the keys and values that a strategy keeps from step to step, received ones and those still on their
    way."""
    total = 0
    for built in engine._built.values():
        flows = getattr(getattr(built.wraps.get("attention/cache"), "__self__", None), "flows", {})
        for flow in flows.values():
            for kept in flow.kept.values():
                tensors = [kept.k, kept.v] if hasattr(kept, "k") else [*kept.old.values(), *kept.fresh.values()]
                total += sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
    return total


def expected(name: str, n: int) -> tuple[float, str]:
    """Bytes a step that all ranks send together, in units of tokens x hidden, and how they come about."""
    rows = (TOKENS + TEXT) / TOKENS  # the text's rows count as tokens
    picture_only = TEXT / TOKENS * 2 / LAYERS  # the last block puts out no text
    return {
        "tp": (4 * (n - 1) * (rows - picture_only / 2) * LAYERS, "4 L, each rank its (N-1)/N"),
        "distrifusion": (2 * (n - 1) * rows * LAYERS, "2 L, each rank its 1/N to N-1 others"),
        "usp.ring": (2 * (n - 1) * rows * LAYERS, "2 L, each rank 1/N at N-1 hops"),
        "usp.ulysses": (4 * (n - 1) / n * rows * LAYERS, "4/N L for each rank, of which 1/N stays"),
        "pipefusion": (n - 1, "2 for a rank: it receives and sends 1; N-1 links"),
    }[name]


# The axes whose traffic the table of the methods speaks of; the others are the ends of a step and the text's way along
# the stages.
MAIN = {
    "tp": "tp",
    "distrifusion": "distrifusion",
    "usp.ring": "ring",
    "usp.ulysses": "ulysses",
    "pipefusion": "stages",
}
PARAMETERS = {"tp": "P/N", "distrifusion": "P", "usp.ring": "P", "usp.ulysses": "P", "pipefusion": "P/N"}
BUFFERS = {"tp": "0", "distrifusion": "KV L", "usp.ring": "0", "usp.ulysses": "0", "pipefusion": "KV L/N"}


def main() -> None:
    from xdit_core.testing.models import save_tiny_sd3

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default=str(Path(__file__).parents[1] / "docs" / "measured" / "costs.md"))
    args = parser.parse_args()
    unit, lines, pool = TOKENS * HIDDEN * 4, [], Pool()
    with tempfile.TemporaryDirectory() as folder:
        save_tiny_sd3(folder, layers=LAYERS, heads=HEADS, head_dim=DIM, sample_size=SIDE, text_tokens=TEXT)
        whole = pool.run(measured, folder, [], {}, world=1)[0][1]
        for name in settings(2):
            for n in DEGREES:
                plugins, values = settings(n)[name]
                results = pool.run(measured, folder, plugins, values, world=n, timeout=300)
                sent = [r[0].get(MAIN[name], 0) / unit for r in results]
                other: dict[str, float] = {}
                for r in results:
                    for axis, count in r[0].items():
                        if axis != MAIN[name]:
                            other[axis] = other.get(axis, 0) + count / unit
                want, why = expected(name, n)
                rest = ", ".join(f"{axis} {count:.2f}" for axis, count in sorted(other.items()))
                parameters, kept = max(r[1] for r in results) / whole, max(r[2] for r in results) / (2 * unit * LAYERS)
                lines.append(
                    f"| {name} | {n} | {sum(sent):.2f} | {want:.2f} ({why}) | {rest} | {parameters:.3f} "
                    f"({PARAMETERS[name]}) | {kept:.3f} ({BUFFERS[name]}) |"
                )
                print(lines[-1], flush=True)
    pool.close()
    Path(args.out).write_text(PAGE.format(table="\n".join(lines), text=TEXT, tokens=TOKENS), encoding="utf-8")


PAGE = """# What each strategy sends and holds

Counted by `python benchmarks/costs.py`, not estimated. The model is an SD3 with random weights, 8 blocks,
{tokens} picture tokens and {text} text tokens, without guidance; the counts are those of one step after the
warm-up. L is the number of blocks, N the number of ranks, P the parameters of all blocks, KV the keys and
values of one block.

| strategy | N | sent | expected | besides | parameters | kept |
|---|---|---|---|---|---|---|
{table}

- **sent**: bytes that all ranks send together, in units of tokens x hidden size.
- **expected**: the same from the formula of the paper in brackets (TP 4 L, DistriFusion 2 L, Ring 2 L,
  Ulysses 4/N L, PipeFusion 2, each for one rank), with the text counted as tokens.
- **besides**: `gather` and `distrifusion.latents` collect the tokens at the end of a step. `stages.text` is
  the text, sent with the first patch. `latents` is the prediction on its way back to the first stage.
  `tp.modulation` is the modulation of the blocks.
- **parameters**: parameters of the blocks on the rank that holds most, as a part of P. Under `tp`, norms and
  the biases of row-wise matrices are not divided.
- **kept**: keys and values that are kept from step to step, in units of KV L. DistriFusion holds those of the
  step before and those that arrive, so up to twice KV L.
"""


if __name__ == "__main__":
    main()
