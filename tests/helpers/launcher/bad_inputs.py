"""Random bad input to the launcher: it answers with sentences and a documented exit code, and changes nothing on disk.

python tests/helpers/launcher/bad_inputs.py 1000 --seed 1          (prints each find with the words that lead to it)

Most inputs run in this process, where starting a run is replaced; one in fifty is a process of its own, as a user
starts it.
"""

from __future__ import annotations

import argparse
import os
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
from pathlib import Path
from unittest import mock

from click.testing import CliRunner

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

from helpers.launcher.bad_words import Case, Generator
from xdit_core.errors import UsageError, XditError
from xdit_core.printable import printable
from xdit_core.worker.entry import read_plan
from xdit_launcher.backends import registry
from xdit_launcher.cli import cli

CODES = (0, 1, 2, 3)  # of README; 4 and 130 need a run
SLOW = 20.0  # seconds that no answer takes, even on a busy machine
LINES, CHARACTERS = 40, 6000  # of an answer


def png(text: bytes = b"") -> bytes:
    """A PNG of one pixel that somebody else has made."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    head = (1).to_bytes(4, "big") * 2 + bytes((8, 0, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + text
        + chunk(b"IDAT", zlib.compress(b"\0\0"))
        + chunk(b"IEND", b"")
    )


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
        if may_run(case.words):  # before all words, since behind -- it would be a prompt
            words = ["run", "--dry-run", *(words[1:] if words[:1] == ["run"] else words)]
        command = [sys.executable, "-m", "xdit_launcher", *words]
        done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=SLOW)
        return done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace")
    with (
        mock.patch.object(registry.Backend, "start", lambda self, plan, folder: 0),
        mock.patch.object(registry.Backend, "connect", refuse),
        mock.patch("xdit_launcher.commands.verify.Verify.__call__", lambda self: 0),
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
                case,
                folder,
                counts,
                alone=number % 50 == 49 and "doctor" not in case.words and "verify" not in case.words,
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
    from xdit_core.planning.planner import make_plan

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
        counts = run(
            arguments.count, arguments.seed, Path(name), good_plan(Path(name)), lambda text: print(text, flush=True)
        )
    print(dict(counts))
    return 1 if counts["finds"] else 0


if __name__ == "__main__":
    sys.exit(main())
