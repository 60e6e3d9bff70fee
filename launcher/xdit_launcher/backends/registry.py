"""Find the backends that are installed, by their entry points in the group ``xdit.launchers``, and choose one.

`xdit_launcher.backends.base` says what a backend is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

from xdit_core.errors import PluginError, UsageError
from xdit_core.registry import discovery
from xdit_core.registry.discovery import InstalledPlugin
from xdit_core.registry.registry import STRATEGIES
from xdit_core.settings import build, check_class, check_keys, did_you_mean, fields_of
from xdit_launcher.backends.base import Backend

LAUNCHERS = "xdit.launchers"
DEFAULT = "local"

# Options that stand for a setting of the backend: --hosts a,b --on ssh is ssh.hosts=a,b.
OPTIONS = (
    click.option(
        "--on",
        "backend",
        metavar="NAME",
        help="The backend that starts the processes; default: local, or the one that takes the options below.",
    ),
    click.option("--hosts", metavar="A:8,B:8", help="Machines, with the number of processes on each."),
    click.option("--hostfile", metavar="FILE", help="A file that names the machines in lines such as: host slots=8."),
    click.option("--include", metavar="A@B:0,1", help="Use only these hosts, and only these of their devices."),
    click.option("--exclude", metavar="A@B:0,1", help="Use all hosts and devices but these."),
    click.option("--nnodes", metavar="N", help="Number of machines."),
    click.option(
        "--node-rank",
        metavar="K",
        help="The number of this machine, from 0, where you start the command on each machine by hand.",
    ),
    click.option(
        "--rdzv",
        metavar="HOST:PORT",
        help="Where the ranks meet: an address of the first machine and a free port there.",
    ),
)


def options(command: Any) -> Any:
    """Give a command the options of the backends."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def installed() -> dict[str, list[InstalledPlugin]]:
    """The installed backends by name, those of xdit itself first."""
    backends = discovery.installed(LAUNCHERS).plugins
    return dict(sorted(backends.items(), key=lambda pair: (pair[1][0].distribution != discovery.OWN, pair[0])))


def load(name: str) -> Any:
    """The module of a backend.

    Raises:
        UsageError: there is none of that name.
        PluginError: it cannot be used.
    """
    backends = installed()
    if name not in backends:
        raise UsageError(f"unknown backend {name!r} in --on; {did_you_mean(name, backends)}")
    if len(backends[name]) > 1:
        distributions = " and ".join(f"{plugin.distribution} {plugin.version}" for plugin in backends[name])
        raise PluginError(f"{distributions} all have a backend {name}; uninstall all but one of them.")
    try:
        with discovery.contained():
            module = backends[name][0].entry.load()
            module.start  # noqa: B018
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit too
        reason = f"{type(error).__name__}: {error}"
        raise PluginError(f"backend {name} cannot be loaded: {reason}; repair or uninstall it.") from error
    if settings := getattr(module, "Settings", None):
        check_class(settings, name)
    return module


def choose(
    name: str | None, options: Mapping[str, str | None], values: Mapping[str, Any]
) -> tuple[Backend, dict[str, Any]]:
    """Choose the backend that ``--on`` names, or else one that takes the options, and read its settings.

    Args:
        name: the value of ``--on``, None if it was left out.
        options: the options of `OPTIONS` by name, None for those that were left out.
        values: flat settings.

    Returns:
        The backend, and the settings that are not its own.

    Raises:
        UsageError: it does not take an option or setting.
    """
    flags = {k: v for k, v in options.items() if v is not None}
    name = name or backend_for(flags)
    module = load(name)
    cls = getattr(module, "Settings", None)
    backend_values = {k: v for k, v in values.items() if k.startswith(f"{name}.")}
    for option in flags:
        if option not in fields_of(cls):
            takers = [backend for backend in installed() if takes(backend, (option,))]
            fix = f"add --on {' or '.join(takers)}, or leave it out" if takers else "leave it out"
            raise UsageError(f"the backend {name} does not take --{option.replace('_', '-')}; {fix}.")
        if f"{name}.{option}" in backend_values:
            raise UsageError(f"--{option.replace('_', '-')} and {name}.{option}= say the same; keep one.")
        backend_values[f"{name}.{option}"] = flags[option]
    if errors := check_keys(backend_values, {f"{name}.": cls}):
        raise errors[0]
    others = {k: v for k, v in values.items() if k not in backend_values}
    strategies = discovery.installed(STRATEGIES).plugins
    for key in others:
        prefix = key.split(".")[0]
        if "." in key and prefix in installed() and prefix not in (*strategies, "model", "call"):
            raise UsageError(f"{key} belongs to the backend {prefix}; add --on {prefix}, or leave it out.")
    return Backend(name, module, build(cls, f"{name}.", backend_values)), others


def backend_for(flags: Mapping[str, str]) -> str:
    """The name of the default backend if it takes the options, else of the first that does."""
    names = (DEFAULT, *(name for name in installed() if name != DEFAULT))
    return next((name for name in names if takes(name, flags)), DEFAULT) if flags else DEFAULT


def takes(name: str, flags: Mapping[str, str] | Sequence[str]) -> bool:
    """Whether a backend has settings of these names; one that is broken has none."""
    try:
        return set(flags) <= set(fields_of(getattr(load(name), "Settings", None)))
    except (UsageError, PluginError):
        return False
