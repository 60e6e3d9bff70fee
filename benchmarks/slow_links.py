"""How much of its speed each method keeps when the link between two hosts is slow.

The hosts are two network namespaces with one rank and one thread each; ``tc tbf`` limits what each sends. The model is
the SD3-shaped random one of ``shapes.py``. For each method in turn: one engine, then every rate after the other. Bytes
on the wire are read from the interface.

As root; it takes about ten minutes::

    python benchmarks/slow_links.py --rates 10G 1G 200M --steps 6 --picture docs/pictures/slow_links.png
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

METHODS: Mapping[str, tuple[list[str], dict[str, Any]]] = MappingProxyType(
    {
        "pipefusion": (["pipefusion"], {"pipefusion.stages": 2, "pipefusion.patches": 4}),
        "distrifusion": (["distrifusion"], {"distrifusion.degree": 2}),
        "ulysses": (["usp"], {"usp.ulysses": 2, "usp.ring": 1}),
        "ring": (["usp"], {"usp.ulysses": 1, "usp.ring": 2}),
        "tp": (["tp"], {"tp.degree": 2}),
        "cfg": (["cfg"], {"guidance": 4.0}),
    }
)
UNITS = MappingProxyType({"K": 1e3, "M": 1e6, "G": 1e9})
PORT = 29611


def bits(text: str) -> float:
    """``200M`` in bits a second.

    Raises:
        ValueError: it is no rate.
    """
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].upper() in UNITS else (text, "")
    value = float(number) * UNITS.get(unit, 1.0)
    if value < 1e6:
        raise ValueError(f"{text} is no rate of 1M or more; write for example 200M or 1G.")
    return value


def worker(rank: int, address: str, method: str, folder: str, steps: int) -> None:
    """A rank on its host: does what is asked on stdin, answers on stdout."""
    import torch
    import torch.distributed as dist

    from xdit_core import Engine, make_plan
    from xdit_core.testing.hosts import sent_by
    from xdit_launcher.cluster import bandwidth

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://{address}:{PORT}", rank=rank, world_size=2)
    plugins, settings = METHODS[method]
    values = {
        "model": "sd3",
        "model.path": folder,
        "guidance": 1.0,
        "max_sequence_length": 0,
        "output_type": "latent",
        "device": "cpu",
    }
    engine = Engine(make_plan(plugins, {**values, **settings, "steps": steps}))
    answer: dict[str, Any] = {"ready": True}
    while True:
        print(json.dumps(answer), flush=True)
        word = sys.stdin.readline().strip()
        if word == "speed":
            ports = [bandwidth.serve(30.0) if rank == 0 else 0]
            dist.broadcast_object_list(ports, src=0)
            answer = bandwidth.measure([address], ports[0], 1.0) if rank else {}
        elif word == "draw":
            engine.rank.sent.clear()
            dist.barrier()
            before, started = sent_by(), time.perf_counter()
            engine.generate("a red fox")
            answer = {
                "seconds": time.perf_counter() - started,
                "wire": sent_by() - before,
                "sent": sum(engine.rank.sent.values()),
            }
        else:
            break
    engine.close()
    dist.destroy_process_group()


class Pair:
    """The two ranks of a method."""

    def __init__(self, hosts: Any, method: str, folder: str, steps: int) -> None:
        env = {**os.environ, "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
        self.processes = []
        for rank, name in enumerate(hosts.names):
            words = [
                "--worker",
                str(rank),
                "--address",
                hosts.address(hosts.names[0]),
                "--only",
                method,
                "--folder",
                folder,
                "--steps",
                str(steps),
            ]
            command = [*hosts.inside(name), sys.executable, __file__, *words]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
            self.processes.append(subprocess.Popen(command, env=env, **pipes))  # type: ignore[call-overload]
        self.answers()

    def answers(self) -> list[Any]:
        """Of both."""
        lines = [p.stdout.readline() for p in self.processes]
        if not all(lines):
            raise RuntimeError("a rank has ended; run it by hand with --worker to see why.")
        return [json.loads(line) for line in lines]

    def ask(self, word: str) -> list[Any]:
        """Ask both."""
        for p in self.processes:
            p.stdin.write(word + "\n")
            p.stdin.flush()
        return self.answers()

    def close(self) -> None:
        """End both."""
        for p in self.processes:
            p.stdin.close()
        for p in self.processes:
            try:
                p.wait(20)
            except subprocess.TimeoutExpired:
                p.kill()


def table(found: Mapping[str, Mapping[str, Any]], rates: Sequence[str]) -> list[str]:
    """Markdown."""
    head = [
        "",
        *(f"s/step at {rate}bit" for rate in rates),
        *(f"speed kept at {rate}bit" for rate in rates[1:]),
        "MB sent a step",
        "on the wire",
    ]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for method, rows in found.items():
        fastest = rows[rates[0]]["step"]
        kept = [f"{100 * fastest / rows[rate]['step']:.0f} %" for rate in rates[1:]]
        last = rows[rates[-1]]
        own, wire = last["sent"] / 1e6, 100 * (last["wire"] / last["sent"] - 1)
        cells = [*(f"{rows[rate]['step']:.2f}" for rate in rates), *kept, f"{own:.2f}", f"{wire:+.1f} %"]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines


def picture(found: Mapping[str, Mapping[str, Any]], rates: Sequence[str], path: Path) -> None:
    """Bars: the speed that each method keeps."""
    from PIL import Image, ImageDraw, ImageFont

    colours = ("#c6d3e1", "#7fa3cb", "#2f5f98")
    wide, left, top, tall, bar = 1200, 80, 70, 360, 46
    image = Image.new("RGB", (wide, top + tall + 70), "#ffffff")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(size=18)
    for percent in range(0, 101, 20):
        y = top + tall * (1 - percent / 100)
        pen.line((left, y, wide - 20, y), "#d8d8d8")
        pen.text((left - 12, y), f"{percent} %", "#202020", font, anchor="rm")
    at = float(left)
    for rate, colour in zip(rates, colours, strict=False):
        pen.rectangle((at, 22, at + 22, 44), colour)
        pen.text((at + 32, 33), f"{rate}bit", "#202020", font, anchor="lm")
        at += 60 + pen.textlength(f"{rate}bit", font)
    pen.text((wide - 20, 33), "speed kept, of that at the fastest link", "#606060", font, anchor="rm")
    step = (wide - left - 20) / len(found)
    for i, (method, rows) in enumerate(found.items()):
        start = left + step * i + (step - bar * len(rates)) / 2
        for j, (rate, colour) in enumerate(zip(rates, colours, strict=False)):
            share = min(rows[rates[0]]["step"] / rows[rate]["step"], 1.0)
            x, y = start + j * bar, top + tall * (1 - share)
            pen.rectangle((x, y, x + bar - 6, top + tall), colour)
            pen.text((x + bar / 2 - 3, y - 12), f"{100 * share:.0f}", "#404040", font, anchor="mm")
        pen.text((left + step * (i + 0.5), top + tall + 26), method, "#202020", font, anchor="mm")
    image.save(path)


def measure(args: argparse.Namespace, folder: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Seconds and bytes a step of each method at each rate, and what the links really give."""
    from xdit_core.testing.hosts import hosts

    found: dict[str, Any] = {}
    links: dict[str, Any] = {}
    with hosts(("alpha", "beta")) as made:
        for method in [m for m in METHODS if args.only in m]:
            made.rate(bits(args.rates[0]))
            pair = Pair(made, method, folder, args.steps)
            try:
                pair.ask("draw")  # warms up
                found[method] = {}
                for rate in args.rates:
                    made.rate(bits(rate))
                    if rate not in links:
                        links[rate] = pair.ask("speed")[1]
                    rounds = [pair.ask("draw") for _ in range(args.rounds)]
                    best = min(rounds, key=lambda answers: max(a["seconds"] for a in answers))
                    found[method][rate] = {
                        "step": max(a["seconds"] for a in best) / args.steps,
                        "sent": max(a["sent"] for a in best) / args.steps,
                        "wire": max(a["wire"] for a in best) / args.steps,
                    }
                    print(f"{method} at {rate}bit: {found[method][rate]}", file=sys.stderr, flush=True)
            finally:
                pair.close()
    return found, links


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rates", nargs="+", default=["10G", "1G", "200M"])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", default="", help="part of a method's name")
    parser.add_argument("--picture", default=None)
    parser.add_argument("--json", default=None)
    for hidden in ("--worker", "--address", "--folder"):
        parser.add_argument(hidden, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(int(args.worker), args.address, args.only, args.folder, args.steps)
        return
    from shapes import make_model

    from xdit_core.testing.hosts import missing

    try:
        for rate in args.rates:
            bits(rate)
    except ValueError as error:
        sys.exit(str(error))
    if why := missing("tc"):
        sys.exit(f"{why}; run this as root with iproute2 installed.")
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        found, links = measure(args, folder)
    for rate, link in links.items():
        print(
            f"{rate}bit: {8 * link['bandwidth'] / 1e6:.0f} Mbit/s measured, {1e3 * link['latency']:.2f} ms a round trip"
        )
    print("\n".join(table(found, args.rates)))
    if args.picture:
        picture(found, args.rates, Path(args.picture))
    if args.json:
        Path(args.json).write_text(json.dumps({"methods": found, "links": links}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
