"""The LoRAs that requests may ask for by name. Without torch.

Whoever starts a gang or a service says which files there are. A request has names and scales; nothing of it is ever
opened as a path or looked for on the hub.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xdit_core.checkpoints.hub import locate_lora
from xdit_core.checkpoints.weights import read_header
from xdit_core.errors import UsageError
from xdit_core.filesystem import read_text, user_path
from xdit_core.settings import lora_scale, parse_loras

if TYPE_CHECKING:
    from xdit_core.plan import Plan

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
FIX = "write NAME = PATH or hub id on each line"
SHOWN = 40  # characters of a name that is not known


class AllowedLoras(Mapping[str, str]):
    """Names of LoRAs, each with the path of its file or folder.

    Args:
        paths: by name; see `checked` for what they must be.
    """

    def __init__(self, paths: Mapping[str, str] | None = None) -> None:
        self._paths = dict(paths or {})
        self._names = {path: name for name, path in self._paths.items()}

    def __getitem__(self, name: str) -> str:
        return self._paths[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)

    def scales(self, lora: Any) -> dict[str, float]:
        """Check what a request asks for.

        Args:
            lora: a mapping from name to scale, or a text such as ``ink:0.5,watercolor``.

        Returns:
            Scales other than 0 by name, in one order.

        Raises:
            UsageError: a name is not allowed or is given twice, or a scale makes no sense.
        """
        paths, scales = self._paths, dict[str, float]()
        for name, scale in pairs_of(lora):
            if name not in paths:
                known = f"known are {', '.join(sorted(paths))}" if paths else "none is allowed here; leave lora out"
                raise UsageError(f"lora: there is no LoRA {name[:SHOWN]!r}; {known}.")
            if name in scales:
                raise UsageError(f"lora: {name} is given twice; keep one of them.")
            scales[name] = lora_scale(f"lora: {name}", scale)
        return {name: scale for name, scale in sorted(scales.items()) if scale}

    def texts(self, lora: Any) -> list[str]:
        """What a request asks for as texts ``PATH:scale``, as the ranks take them.

        Raises:
            UsageError: as of `scales`.
        """
        paths = self._paths
        return [f"{paths[name]}:{scale!r}" for name, scale in self.scales(lora).items()]

    def reload(self) -> int:
        """Find out again what is allowed.

        Returns:
            The number of LoRAs.

        Raises:
            XditError: that failed, and the LoRAs stay as they are.
        """
        return len(self._paths)

    def named(self, sentence: str) -> str:
        """A sentence with the names of LoRAs in place of their paths."""
        for path, name in sorted(self._names.items(), key=lambda item: -len(item[0])):
            sentence = sentence.replace(path, name)
        return sentence


class LoraFile(AllowedLoras):
    """The LoRAs of a file with ``NAME = PATH or hub id`` on each line.

    Args:
        file: as of ``--loras``; None for no LoRAs. Relative paths begin in its folder.
        plan: to whose weights they are added.

    Raises:
        XditError: the file cannot be read, or a LoRA cannot be used.
    """

    def __init__(self, file: str | None, plan: Plan) -> None:
        super().__init__()
        self._file, self._plan = file, plan
        self.reload()

    def reload(self) -> int:
        """Read the file again."""
        if self._file is None:
            return 0
        given, path = f"--loras {self._file}", Path(user_path(self._file, "--loras "))
        sources: dict[str, str] = {}
        for line in read_text(path, given, FIX).splitlines():
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            name, sign, source = (part.strip() for part in line.partition("="))
            if not sign or name in sources:
                what = f"names {name[:SHOWN]} twice" if sign else f"has the line {line.strip()[:SHOWN]!r}"
                raise UsageError(f"{given} {what}; {FIX}.")
            sources[name] = source
        self._paths = checked(sources, self._plan, given, path.parent)
        self._names |= {path: name for name, path in self._paths.items()}  # a request with another one may be drawn now
        return len(self._paths)


def pairs_of(lora: Any) -> Iterator[tuple[str, Any]]:
    """Pairs of name and scale of what a request asks for.

    Raises:
        UsageError: it is neither a mapping nor a text.
    """
    if isinstance(lora, Mapping):
        yield from ((str(name), scale) for name, scale in lora.items())
        return
    if not isinstance(lora, str):
        raise UsageError('lora has names with scales; write {"NAME": 0.8}, or "NAME:0.8,OTHER".')
    for part in filter(None, (part.strip() for part in lora.split(","))):
        name, sign, number = part.partition(":")
        try:
            yield name.strip(), float(number) if sign else 1.0
        except ValueError:
            yield name.strip(), number


def checked(sources: Mapping[str, str], plan: Plan, given: str, folder: Path = Path()) -> dict[str, str]:
    """Absolute paths of LoRAs, which are fetched from the hub where a hub id is given.

    Args:
        sources: a path or hub id by name.
        plan: to whose weights they are added.
        given: what has named them, for messages.
        folder: where relative paths begin.

    Raises:
        UsageError: a name cannot be used, or a file is given twice or is loaded by the plan already.
        ModelError: a file is missing or damaged, or the hub is out of reach.
    """
    if sources and find_spec("peft") is None:
        raise UsageError(f"{given} needs the package peft; pip install peft.")
    paths: dict[str, str] = {}
    names = dict.fromkeys(parse_loras(plan.run.lora), "lora=") if sources else {}
    for name, source in sources.items():
        if not NAME.fullmatch(name):
            raise UsageError(
                f"{given}: {name[:SHOWN]!r} is no name for a LoRA; use letters, digits, dots, hyphens and underscores."
            )
        path = user_path(str(source), f"{given}: {name} = ")
        found = Path(os.path.abspath(folder / path))
        if not source or not found.exists():
            found = locate_lora(str(source), f"{given}: {name}")
        for file in sorted(found.glob("*.safetensors")) if found.is_dir() else [found]:
            if file.suffix == ".safetensors":
                read_header(file)
        if str(found) in names:
            raise UsageError(f"{given}: {name} and {names[str(found)]} are the same file; keep one of them.")
        names[str(found)] = name
        paths[name] = str(found)
    return paths
