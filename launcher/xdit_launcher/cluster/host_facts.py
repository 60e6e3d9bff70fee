"""Find out what a machine has and runs, and compare it with another one. Quick, and without torch."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil  # type: ignore[import-untyped]

from xdit_core import machine
from xdit_core.registry.discovery import installed
from xdit_core.registry.registry import MODELS, STRATEGIES

if TYPE_CHECKING:
    from xdit_core.plan import Plan

PACKAGES = ("xdit", "torch", "diffusers", "transformers")
CODE = ("xdit_core", "xdit_launcher")
SUFFIXES = (".json", ".txt", ".model", ".safetensors", ".py")  # of the files of a checkpoint that are read
VARIANTS = frozenset(("fp16", "bf16", "non_ema"))  # parts of the names of files that are not read


def origins(plan: Plan | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Distributions and top-level packages that a plan uses, or all that are installed if there is no plan."""
    entries = [f for group in (STRATEGIES, MODELS) for items in installed(group).plugins.values() for f in items]
    if plan is not None:
        entries = [f for f in entries if (f.name in plan.plugins if f.group == STRATEGIES else f.name == plan.model)]
    modules = [f.entry.module for f in entries]
    distributions = {f.distribution for f in entries}
    return tuple(sorted({*PACKAGES, *distributions})), tuple(sorted({*CODE, *(m.split(".")[0] for m in modules)}))


def about(distributions: Iterable[str], modules: Iterable[str], model: str) -> dict[str, Any]:
    """Facts about this machine, as JSON.

    Args:
        distributions: whose versions matter.
        modules: whose code must be the same everywhere.
        model: a checkpoint folder, "" if there is none yet.
    """
    return {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in distributions},
        "code": {name: code_digest(name) for name in modules},
        "gpus": gpus(),
        "cores": machine.cores(),
        "free memory": psutil.virtual_memory().available,
        "model": checkpoint(Path(model)) if model else None,
        "folder": os.getcwd(),
        "free disk": shutil.disk_usage(os.getcwd()).free,
        "addresses": addresses(),
    }


def alike(answer: Any, expected: Any) -> bool:
    """Whether an answer has the expected shape: the same names, and values of the same types."""
    if isinstance(expected, dict) and isinstance(answer, dict):
        may_be_none = {"model"}  # a machine may lack it
        return set(expected) <= set(answer) and all(
            alike(answer[name], value) or (name in may_be_none and answer[name] is None)
            for name, value in expected.items()
        )
    if isinstance(expected, list) and isinstance(answer, list):
        return all(alike(value, expected[0]) for value in answer) if expected else True
    return expected is None or isinstance(answer, (int, float) if isinstance(expected, float) else type(expected))


def version(distribution: str) -> str:
    """The version of a distribution, "" if it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def code_digest(package: str) -> str:
    """A digest of the Python files of a package, "" if it is not installed.

    Two working copies can differ and have the same version.
    """
    try:
        spec = util.find_spec(package)
    except (ImportError, ValueError):
        return ""
    if spec is None or not spec.submodule_search_locations:
        return "" if spec is None or not spec.origin else digest([Path(spec.origin)])
    root = Path(next(iter(spec.submodule_search_locations)))
    return digest(sorted(root.rglob("*.py")), root)


def digest(files: Iterable[Path], root: Path | None = None) -> str:
    """A digest of the names and contents of files."""
    total = hashlib.sha256()
    for path in files:
        total.update(str(path.relative_to(root) if root else path.name).encode())
        total.update(path.read_bytes())
    return total.hexdigest()[:12]


def checkpoint(folder: Path) -> str | None:
    """A fingerprint of names and sizes of the files of a checkpoint, None if the folder is not there."""
    if not folder.is_dir():
        return None
    files = (
        p for p in folder.rglob("*") if p.suffix in SUFFIXES and p.is_file() and not set(p.name.split(".")) & VARIANTS
    )
    sizes = sorted((str(p.relative_to(folder)), p.stat().st_size) for p in files)
    return hashlib.sha256(repr(sizes).encode()).hexdigest()[:12]


def gpus() -> list[dict[str, Any]]:
    """Name, free and total memory in bytes of each GPU; an empty mapping for each where ``nvidia-smi`` says nothing."""
    count = machine.cuda_devices()
    if not count or not shutil.which("nvidia-smi"):
        return [{}] * count
    query = ["nvidia-smi", "--query-gpu=name,memory.free,memory.total", "--format=csv,noheader,nounits"]
    try:
        text = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return [{}] * count
    rows = [[part.strip() for part in line.split(",")] for line in text.splitlines() if line.strip()]
    if len(rows) != count:  # it shows GPUs that are hidden from processes here
        return [{}] * count
    try:
        return [{"name": name, "free": int(free) << 20, "total": int(total) << 20} for name, free, total in rows]
    except ValueError:  # "[N/A]" where memory is shared with the CPU
        return [{}] * count


def addresses() -> list[str]:
    """IPv4 addresses by which others may reach this machine; its own loopback comes last."""
    up = {name for name, s in psutil.net_if_stats().items() if s.isup}
    ipv4 = [
        address.address
        for name, addresses in psutil.net_if_addrs().items()
        if name in up
        for address in addresses
        if address.family == socket.AF_INET
    ]
    return sorted(ipv4, key=lambda a: a.startswith("127."))


def resolved(names: Iterable[str]) -> dict[str, str]:
    """The address of each host name, "" if it has none here."""
    resolved_names = {}
    for name in names:
        try:
            resolved_names[name] = socket.gethostbyname(name)
        except OSError:
            resolved_names[name] = ""
    return resolved_names


PROBE = """
import json, torch, diffusers
cuda = torch.cuda.is_available()
print(json.dumps({"cuda": torch.version.cuda, "devices": torch.cuda.device_count() if cuda else 0}))
"""


def imported(seconds: float) -> dict[str, Any]:
    """Import torch and diffusers in a process of its own.

    Args:
        seconds: after which it is given up.

    Returns:
        ``devices``: how many GPUs torch sees, and ``cuda``: its CUDA version; or ``error``.
    """
    try:
        probe = subprocess.run([sys.executable, "-P", "-c", PROBE], capture_output=True, text=True, timeout=seconds)
        if probe.returncode != 0:
            return {"error": last_line(probe.stderr)}
        answer: dict[str, Any] = json.loads(probe.stdout.splitlines()[-1])
    except (OSError, ValueError, IndexError, subprocess.SubprocessError) as error:
        return {"error": str(error)}
    return answer


def last_line(text: str) -> str:
    """The last line of a traceback, which says what is wrong."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it ended without a message")


def differences(remote: Mapping[str, Any], local: Mapping[str, Any], host: str) -> Iterator[str]:
    """Sentences about what must be the same on all machines and is not.

    Args:
        remote, local: facts as `about` returns them; ``local`` are those of the machine where the launcher runs.
        host: name of the other machine.
    """
    differ = False
    for name in local["versions"]:
        # +cpu and +cu130 are the same code
        wanted, present = (about["versions"].get(name, "").split("+")[0] for about in (local, remote))
        if present == wanted:
            continue
        differ = True
        what = f"{host} has {f'{name} {present}' if present else f'no {name}'}, and this machine {wanted or 'none'}"
        fix = f"run pip install {name}=={wanted} there" if wanted else f"install {name}=={present} here too"
        yield f"{what}; {fix}."
    if remote["python"].split(".")[:2] != local["python"].split(".")[:2]:
        yield (
            f"{host} runs Python {remote['python']}, and this machine {local['python']}; use the same minor version "
            "on both."
        )
    for name, digest_here in local["code"].items():
        if not differ and remote["code"].get(name) != digest_here:
            yield (
                f"the code of {name} on {host} is not that of this machine though the versions are equal; install "
                "the same copy there."
            )


def same_machine(about: Mapping[int, Any], names: Mapping[int, str]) -> Iterator[str]:
    """Sentences about machines that were given two names."""
    first: dict[Any, int] = {}
    for i, facts in sorted(about.items()):
        key = (facts["host"], tuple(sorted(a for a in facts["addresses"] if not a.startswith("127."))))
        if names[i] != names[first.setdefault(key, i)]:
            yield f"{names[first[key]]} and {names[i]} are one machine; name it once, with more slots."


def device_problem(plan: Plan, gpus: bool, where: str) -> str:
    """A sentence about a plan that is for CPUs only because this machine has no GPU, "" if there is no such problem.

    Args:
        gpus: the machines that will run it have some.
        where: words that say so.
    """
    if plan.device != "cpu" or "device" in plan.values or not gpus:
        return ""
    return f"this machine has no GPU and {where}; choose where to run with device=cuda or device=cpu."


def model_problem(remote: Mapping[str, Any], local: Mapping[str, Any], host: str, folder: str) -> str:
    """A sentence about a checkpoint that is missing or differs, "" if it is the same."""
    if not local["model"] or remote["model"] == local["model"]:
        return ""
    if remote["model"] is None:
        return f"{host} has no folder {folder}; copy the model there, or keep it on a disk that all hosts share."
    return f"{folder} on {host} holds other files than on this machine; copy the model there again."
