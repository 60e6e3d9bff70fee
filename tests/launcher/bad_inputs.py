"""Random bad input to the launcher: it answers with sentences and a documented exit code, and changes nothing on disk.

python tests/launcher/bad_inputs.py 1000 --seed 1          (prints each find with the words that lead to it)

Most inputs run in this process, where starting a run is replaced; one in fifty is a process of its own, as a user starts it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from click.testing import CliRunner

from xdit_core.errors import UsageError, XditError
from xdit_core.printable import printable
from xdit_core.settings import ModelSettings, RunSettings, fields_of
from xdit_core.worker import read_plan
from xdit_launcher import backends
from xdit_launcher.cli import cli

CODES = (0, 1, 2, 3)  # of README; 4 and 130 need a run
SLOW = 20.0  # seconds that no answer takes, even on a busy machine
LINES, CHARACTERS = 40, 6000  # of an answer
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
OWN += ("call.num_inference_steps", "call.guidance_scale", "call.prompt", "call.latents", "call.x", "call.", "call.self")
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
    name for name in OWN if name.split(".")[0] in PLUGINS and name.split(".")[1] not in ("scope", "mode", "backend", "kernel")
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
HOSTS = ("a:8,b:8", "a", "a:0", ":8", "a:b", "-oProxyCommand=x", "[::1]:2", "::1", "a:8,a:8", "a@b:0,2", "@", "a b", "user@a:2")
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
        return f"{shown!r}{f' with {more!r}' if more else ''}{f' plan {self.plan[:3000]!r}' if self.plan is not None else ''}"


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
            name for name in PLUGINS if any(word.startswith(f"{name}.") for word in extra) and self.random.random() < 0.9
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
        lines = [" ".join(self.random.choices(words, k=self.random.randrange(1, 4))) for _ in range(self.random.randrange(4))]
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


def png(text: bytes = b"") -> bytes:
    """A PNG of one pixel that somebody else has made."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    head = (1).to_bytes(4, "big") * 2 + bytes((8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + text + chunk(b"IDAT", zlib.compress(b"\0\0")) + chunk(b"IEND", b"")


@contextmanager
def odd_folder(checkpoint: Path) -> Iterator[Path]:
    """A folder with what may lie around, as the current one."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="bad-") as name:
        folder = Path(name).resolve()
        os.chdir(folder)
        try:
            for fifo in ("pipe", "pipe.png"):
                os.mkfifo(fifo)
            for made in ("folder", "folder.png/x"):
                Path(made).mkdir(parents=True)
            for link, to in {
                "circle": "circle",
                "circle.png": "circle.png",
                "dangling": "gone/x",
                "dangling.png": "gone/x.png",
            }.items():
                Path(link).symlink_to(to)
            Path("file").write_text("a fox\n")
            Path("photo.png").write_bytes(png())
            Path("package.json").write_text('{"name": "x"}')
            Path("bytes").write_bytes(bytes(range(256)))
            Path("empty").touch()
            Path("bom").write_bytes(b"\xef\xbb\xbfa fox\n")
            Path("deep.yaml").write_text("a: " + "[" * 3000)
            Path("deep.json").write_text("[" * 3000)
            Path("list.yaml").write_text("- a\n- b\n")
            Path("hosts").write_text("a slots=2\nb slots=2\n")
            with open("huge", "wb") as file:
                file.truncate(2**40)
            shutil.copytree(checkpoint, "checkpoint")
            Path("tmp").mkdir()
            with (
                mock.patch.object(tempfile, "tempdir", str(folder / "tmp")),
                mock.patch.dict(os.environ, TMPDIR=str(folder / "tmp")),
            ):
                yield folder
        finally:
            os.chdir(before)


def snapshot(folder: Path) -> dict[str, tuple[int, int, int]]:
    """What is in a folder: kind, size and time of each file, but for run folders."""
    found = {}
    for root, folders, names in os.walk(folder):
        if Path(root) == folder and "runs" in folders:
            folders.remove("runs")
        for name in (*folders, *names):
            about = os.lstat(os.path.join(root, name))
            own = (0, 0) if stat.S_ISDIR(about.st_mode) else (about.st_size, about.st_mtime_ns)
            found[os.path.relpath(os.path.join(root, name), folder)] = (about.st_mode, *own)
    return found


def answer(case: Case, alone: bool) -> tuple[int, str, str]:
    """Exit code, stdout and stderr.

    Args:
        alone: as a process of its own.
    """
    if case.plan is not None:
        Path("runs").mkdir(exist_ok=True)
        plan = Path("runs/plan.json")
        plan.write_text(case.plan, encoding="utf-8", errors="surrogateescape")
        try:
            read_plan(plan)
        except XditError as error:
            return error.exit_code, "", f"{error}\n"
        return 0, "", ""
    if alone:
        words = [os.fsencode(word) if "\udc80" <= max(word, default="") <= "\udcff" else word for word in case.words]
        command = [sys.executable, "-m", "xdit_launcher", *words, *(["--dry-run"] if may_run(case.words) else [])]
        done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=SLOW)
        return done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace")
    with (
        mock.patch.object(backends.Backend, "start", lambda self, plan, folder: 0),
        mock.patch.object(backends.Backend, "connect", refuse),
        mock.patch("xdit_launcher.verify.Verify.__call__", lambda self: 0),
    ):
        result = CliRunner().invoke(cli, case.words, input="")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def may_run(words: list[str]) -> bool:
    """The words may start something if nothing is wrong with them."""
    return not {"plugins", "models", "doctor", "verify"} & set(words)


def refuse(backend: object) -> None:
    """In place of a way to hosts that do not exist."""
    raise UsageError("no host is reached in this test; leave it out.")


class NoAnswer(BaseException):
    """It took too long; no Exception, which the launcher would take for a mistake of its own."""


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raise `NoAnswer` inside after so many seconds."""

    def ring(number: int, frame: object) -> None:
        raise NoAnswer

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def wrong_with(case: Case, folder: Path, counts: Counter[str] | None = None, alone: bool = False) -> str:
    """What is wrong with the answer to an input, "" if nothing; counts exit codes."""
    shutil.rmtree("changed", ignore_errors=True)
    for name, data in case.files.items():
        if name.startswith("changed/") and not Path("changed").exists():
            shutil.copytree("checkpoint", "changed", symlinks=True)
        Path(name).write_bytes(data)
    before = snapshot(folder)
    began = time.monotonic()
    try:
        with alarm(SLOW):
            code, out, err = answer(case, alone)
    except (subprocess.TimeoutExpired, NoAnswer):
        return f"no answer within {SLOW:.0f} s"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    took, found = time.monotonic() - began, list[str]()
    if counts is not None:
        counts[f"exit {code}"] += 1
    if code not in CODES:
        found.append(f"exit code {code}")
    if "Traceback" in out + err or "unexpected: " in err:
        found.append("a traceback")
    if code in (2, 3) and not err.strip():
        found.append("no word")
    if printable(out + err, keep="\n") != out + err:
        found.append("control characters")
    if code in (2, 3) and (len(err.splitlines()) > LINES or len(err) > CHARACTERS):
        found.append(f"{len(err.splitlines())} lines, {len(err)} characters")
    if took > SLOW:
        found.append(f"{took:.0f} s")
    if (code or "runs" not in str(case)) and (changes := sorted(set(before.items()) ^ set(snapshot(folder).items()))):
        found.append(f"changed {[name for name, _ in changes][:3]}")
    return f"{', '.join(found)}: {(err or out)[-700:]!r}" if found else ""


def run(count: int, seed: int, checkpoint: Path, plan: str, tell: Callable[[str], None] = print) -> Counter[str]:
    """Try so many inputs; tells each find.

    Args:
        plan: of a good run, as JSON.

    Returns:
        How often which exit code came, and under ``finds`` how many were found.
    """
    counts: Counter[str] = Counter()
    with odd_folder(checkpoint) as folder:
        generator = Generator(seed, Path("checkpoint").resolve(), plan)
        for number in range(count):
            case = generator.case()
            problem = wrong_with(
                case, folder, counts, alone=number % 50 == 49 and "doctor" not in case.words and "verify" not in case.words
            )
            counts["inputs"] += 1
            if problem:
                counts["finds"] += 1
                tell(f"seed {seed}, input {number}: {problem}\n    {case}")
            for name in case.files:
                Path(name).unlink(missing_ok=True)
    return counts


def good_plan(checkpoint: Path) -> str:
    """A plan that can be read."""
    from xdit_core.plan import make_plan

    words = {"model": "sd3", "model.path": str(checkpoint), "prompt": ["a fox"], "device": "cpu", "usp.ulysses": "2"}
    return make_plan(["usp"], words).to_json()


def main() -> int:
    """The script."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    from xdit_core.testing.models import save_tiny_sd3

    with tempfile.TemporaryDirectory(prefix="checkpoint-") as name:
        save_tiny_sd3(name)
        counts = run(arguments.count, arguments.seed, Path(name), good_plan(Path(name)), lambda text: print(text, flush=True))
    print(dict(counts))
    return 1 if counts["finds"] else 0


if __name__ == "__main__":
    sys.exit(main())
