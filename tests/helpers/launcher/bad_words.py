"""Draws bad input to the launcher: words, config files, hostfiles, plans and checkpoints with something wrong in
them."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xdit_core.settings import ModelSettings, RunSettings, fields_of

PLUGINS = ("usp", "pipefusion", "cfg", "dp", "tp", "distrifusion", "parallel_vae", "compile", "flash", "offload")
OWN = (
    "usp.ulysses",
    "usp.ring",
    "pipefusion.stages",
    "pipefusion.patches",
    "pipefusion.warmup",
    "pipefusion.layers",
    "tp.degree",
)
OWN += (
    "dp.degree",
    "distrifusion.degree",
    "distrifusion.warmup",
    "parallel_vae.degree",
    "parallel_vae.tiling",
    "compile.scope",
)
OWN += (
    "compile.mode",
    "compile.backend",
    "flash.kernel",
    "offload.mode",
    "ssh.command",
    "ssh.env",
    "slurm.options",
    "local.nnodes",
)
OWN += (
    "call.num_inference_steps",
    "call.guidance_scale",
    "call.prompt",
    "call.latents",
    "call.x",
    "call.",
    "call.self",
)
OPTIONS = (
    "--on",
    "--hosts",
    "--hostfile",
    "--include",
    "--exclude",
    "--nnodes",
    "--node-rank",
    "--rdzv",
    "--config",
    "--plugins",
)
FLAGS = ("--dry-run", "--json", "--trace", "--profile", "--help", "--nonsense", "-x", "--", "--version")
COMMANDS = ("run", "verify", "plugins", "models", "doctor", "plugins show", "nosuch")
NUMBERS = (
    "0",
    "-1",
    "1",
    "2",
    "3",
    "7",
    "33",
    "10000000000",
    "1e300",
    "-1e300",
    "nan",
    "inf",
    "1.5",
    "0x10",
    "9" * 5000,
    "١٢",
    "1_000",
    " 4 ",
)
PLAUSIBLE = (
    "0",
    "1",
    "2",
    "3",
    "4",
    "5",
    "8",
    "15",
    "16",
    "32",
    "100",
    "4096",
    "100000",
    "1000000000",
    "-3",
    "18446744073709551616",
    "0.5",
    "yes",
)
NUMERIC = (
    "steps",
    "guidance",
    "height",
    "width",
    "frames",
    "fps",
    "images",
    "seed",
    "threads",
    "nproc",
    "max_sequence_length",
    "timeout",
)
NUMERIC += tuple(
    name
    for name in OWN
    if name.split(".")[0] in PLUGINS and name.split(".")[1] not in ("scope", "mode", "backend", "kernel")
)
WORDS = (
    "",
    " ",
    "none",
    "yes",
    "no",
    "auto",
    "x",
    "ü",
    "狐狸",
    "🦊",
    "a" * 300,
    "b" * 70000,
    "a b",
    "a,b",
    ",",
    "=",
    "a=b",
    "%s",
    "{}",
    "$(id)",
    "*",
)
CONTROL = ("\x1b[2J", "a\nrank 0 of 1 failed at: x", "\r", "\x07", "\u202e", "\udcff", "\x9b1m", "\u2028")
JSONS = ("[", "[1,2]", '{"a": 1}', "null", "true", "[" * 50000, '{"a":' * 3000, "1e999", '"\\ud800"')
OUTSIDE = ("runs=/", "runs=..", "runs=~", "runs=/dev/full")  # would be honoured
HOSTS = (
    "a:8,b:8",
    "a",
    "a:0",
    ":8",
    "a:b",
    "-oProxyCommand=x",
    "[::1]:2",
    "::1",
    "a:8,a:8",
    "a@b:0,2",
    "@",
    "a b",
    "user@a:2",
)
PATHS = (
    "/dev/zero",
    "/dev/null",
    "/dev/full",
    "/proc/self/mem",
    "/",
    ".",
    "..",
    "~",
    "~nosuchuser/x",
    "pipe",
    "pipe.png",
    "folder",
    "folder.png",
)
PATHS += (
    "circle",
    "circle.png",
    "dangling",
    "dangling.png",
    "file",
    "file/x.png",
    "photo.png",
    "package.png",
    "huge",
    "bytes",
    "empty",
    "bom",
    "deep.yaml",
)
PATHS += (
    "deep.json",
    "list.yaml",
    "x" * 300 + ".png",
    "x" * 252 + ".png",
    "/".join(["d" * 100] * 60),
    "nowhere/y/z.png",
    "a.JPG",
    "a.png",
    "o/",
    "-",
    "hosts",
)


@dataclass
class Case:
    """One input.

    Args:
        words: of the command line.
        files: to write before, by name.
        plan: text of a plan for a worker that is started by hand; then ``words`` mean nothing.
    """

    words: list[str] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    plan: str | None = None

    def __str__(self) -> str:
        shown = [word if len(word) < 200 else f"{word[:60]}...({len(word)})" for word in self.words]
        more = {name: data[:300] for name, data in self.files.items()}
        plan = f" plan {self.plan[:3000]!r}" if self.plan is not None else ""
        return f"{shown!r}{f' with {more!r}' if more else ''}{plan}"


class Generator:
    """Draws inputs.

    Args:
        folder: a checkpoint, whose settings files are changed at random in some inputs.
    """

    def __init__(self, seed: int, folder: Path, plan: str) -> None:
        self.random, self.folder, self.plan = random.Random(seed), folder, plan

    def value(self) -> str:
        """Something that is not expected."""
        kinds = (NUMBERS, NUMBERS, WORDS, CONTROL, JSONS, PATHS, PATHS, HOSTS, (self.noise(),))
        return self.random.choice(self.random.choice(kinds))

    def noise(self) -> str:
        """Characters at random, as arguments of a process can have them."""
        return "".join(
            chr(self.random.choice((self.random.randrange(1, 128), self.random.randrange(128, 0x3000))))
            for _ in range(self.random.randrange(1, 12))
        )

    def key(self) -> str:
        """A setting, or something like one."""
        known = [*fields_of(RunSettings), *("model." + name for name in fields_of(ModelSettings)), *OWN, "model"]
        name = self.random.choice(known)
        return (
            name
            if self.random.random() < 0.9
            else self.random.choice((name[:-1], name + "x", name.upper(), name + ".y", self.noise()))
        )

    def word(self) -> list[str]:
        """One or two words of a command line."""
        draw = self.random.random()
        if draw < 0.3:
            return [f"{self.random.choice(NUMERIC)}={self.random.choice(PLAUSIBLE)}"]
        if draw < 0.6:
            return [f"{self.key()}={self.value()}"]
        if draw < 0.8:
            option = self.random.choice(OPTIONS)
            value = self.random.choice((*HOSTS, *PLUGINS, *PATHS, "local", "ssh", "slurm", "ray", "k8s", self.value()))
            return [f"{option}={value}"] if self.random.random() < 0.3 else [option, value]
        if draw < 0.9:
            return [self.random.choice(FLAGS)]
        return [self.value()]

    def case(self) -> Case:
        """An input: mostly a good command line with one to four things wrong."""
        draw = self.random.random()
        if draw < 0.08:
            return Case(plan=self.changed(self.plan))
        case = Case()
        model = str(self.folder)
        if draw < 0.2:
            model = "changed"
            case.files |= self.changed_checkpoint()
        extra = [word for _ in range(self.random.choice((1, 1, 1, 2, 3))) for word in self.word()]
        good = ["model=sd3", f"model.path={model}", "steps=3", "device=cpu", "a fox"]
        plugins = [
            name
            for name in PLUGINS
            if any(word.startswith(f"{name}.") for word in extra) and self.random.random() < 0.9
        ]
        if self.random.random() < 0.3:
            plugins += self.random.sample(PLUGINS, self.random.randrange(1, 3))
        good = ["--plugins", ",".join(plugins), *good] if plugins else good
        if any(word.startswith("steps=") for word in extra):
            good.remove("steps=3")
        good = [word for word in good if self.random.random() < 0.97]
        if self.random.random() < 0.15:
            case.files["c.yaml"] = self.yaml()
            extra += ["--config", "c.yaml"]
        if self.random.random() < 0.1:
            case.files["h"] = self.hostfile()
            extra += ["--hostfile", "h"]
        command = self.random.choice(COMMANDS).split() if self.random.random() < 0.15 else []
        case.words = [word for word in (*command, *good, *extra) if "\0" not in word and word not in OUTSIDE]
        if self.random.random() < 0.1:
            self.random.shuffle(case.words)
        return case

    def thing(self, depth: int = 0) -> Any:
        """A value of JSON."""
        draw = self.random.random()
        if depth < 3 and draw < 0.3:
            return {
                self.random.choice((self.key(), self.value()))[:50]: self.thing(depth + 1)
                for _ in range(self.random.randrange(3))
            }
        if depth < 3 and draw < 0.5:
            return [self.thing(depth + 1) for _ in range(self.random.randrange(4))]
        return self.random.choice((None, True, 0, -1, 3, 10**12, 1.5, 1e300, "", "x", self.value()[:200]))

    def yaml(self) -> bytes:
        """A config file, or something like one."""
        draw = self.random.random()
        lines = [f"{self.key()}: {self.value()}" for _ in range(self.random.randrange(1, 4))]
        if draw < 0.4:
            text = "\n".join(lines)
        elif draw < 0.7:
            text = json.dumps({self.key(): self.thing() for _ in range(3)})
        elif draw < 0.8:
            text = "a: &a [x, x]\nb: *a\n? [k]\n: v\n!!python/object:os.system z: 1\n" + lines[0]
        else:
            return self.random.randbytes(60)
        return text.encode("utf-8", "surrogateescape" if self.random.random() < 0.5 else "replace")

    def hostfile(self) -> bytes:
        """A hostfile, or something like one."""
        words = (
            *HOSTS,
            "slots=2",
            "slots=",
            "slots=x",
            "python=/bin/python",
            "slots=2 slots=3",
            "# no",
            *CONTROL,
            self.value()[:300],
        )
        lines = [
            " ".join(self.random.choices(words, k=self.random.randrange(1, 4))) for _ in range(self.random.randrange(4))
        ]
        start = b"\xef\xbb\xbf" if self.random.random() < 0.3 else b""
        return start + "\n".join(lines).encode("utf-8", "replace")

    def changed(self, text: str) -> str:
        """JSON with some values replaced, or cut."""
        if self.random.random() < 0.1:
            return text[: self.random.randrange(len(text))]
        found = json.loads(text)
        for _ in range(self.random.randrange(1, 3)):
            at = found
            while True:
                keys = list(at) if isinstance(at, dict) else list(range(len(at)))
                if not keys:
                    break
                key = self.random.choice(keys)
                if not isinstance(at[key], (dict, list)) or self.random.random() < 0.3:
                    if isinstance(at, dict) and self.random.random() < 0.2:
                        del at[key]
                    else:
                        at[key] = self.thing()
                    break
                at = at[key]
        return json.dumps(found)

    def changed_checkpoint(self) -> dict[str, bytes]:
        """A copy of the checkpoint's JSON files, one of them changed; the weights are linked by `prepared`."""
        files = [p for p in sorted(self.folder.rglob("*.json")) if "tokenizer" not in str(p)]
        changed = self.random.choice(files)
        return {f"changed/{changed.relative_to(self.folder)}": self.changed(changed.read_text()).encode()}
