"""Find plugins by entry point, load only those that are selected, and call their hooks."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pluggy

from xdit_core import hookspecs
from xdit_core.errors import PluginError, UsageError
from xdit_core.model_spec import ModelSpec
from xdit_core.registry.discovery import InstalledPlugin, contained, installed
from xdit_core.registry.owners import Owner, line_of, owned_spec
from xdit_core.registry.validation import check_record
from xdit_core.settings import did_you_mean

STRATEGIES = "xdit.plugins"
MODELS = "xdit.models"


class Registry:
    """The plugins of one plan. Two registries share nothing.

    Args:
        extra: plugins that are not installed, by name, such as those of tests.
        extra_models: adapters that are not installed, by name.
    """

    def __init__(
        self, extra: Mapping[str, object] | None = None, extra_models: Mapping[str, ModelSpec] | None = None
    ) -> None:
        self.manager = pluggy.PluginManager(hookspecs.PROJECT)
        self.manager.add_hookspecs(hookspecs)
        self.extra = dict(extra or {})
        self.extra_models = dict(extra_models or {})
        self._origins: dict[str, tuple[str, str]] = {}

    def installed(self, group: str) -> dict[str, list[InstalledPlugin]]:
        """The installed plugins of a group by name.

        A name that several distributions have stands for all of them; it is refused when it is selected.
        """
        return installed(group).plugins

    def names(self, group: str) -> list[str]:
        """Names that can be selected."""
        extra = self.extra if group == STRATEGIES else self.extra_models
        return sorted({*self.installed(group), *extra})

    def pick(self, group: str, name: str) -> InstalledPlugin:
        """The one installed plugin of that name.

        Raises:
            UsageError: there is none, or two distributions claim the name.
        """
        candidates = self.installed(group).get(name, [])
        kind, option = ("plugin", "--plugins") if group == STRATEGIES else ("model", "model=")
        if not candidates:
            raise UsageError(f"unknown {kind} {name!r} in {option}; {did_you_mean(name, self.names(group))}")
        if len(candidates) > 1:
            distributions = " and ".join(f"{c.distribution} {c.version}" for c in candidates)
            raise UsageError(f"two distributions register a {kind} {name!r}: {distributions}; uninstall one of them.")
        return candidates[0]

    def load(self, plugin: InstalledPlugin) -> object:
        """Import one plugin.

        Raises:
            PluginError: the import failed; the others are not touched.
        """
        try:
            with contained():
                return plugin.entry.load()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit too: a plugin must not end the program
            raise PluginError(
                f"plugin {plugin.name} of {plugin.distribution} {plugin.version} cannot be loaded: "
                f"{type(error).__name__}: {error}; repair or uninstall {plugin.distribution}."
            ) from error

    def select(self, names: Iterable[str]) -> dict[str, tuple[str, str]]:
        """Load and register the strategies named.

        Returns:
            Name to (distribution, version), sorted by name.
        """
        chosen: dict[str, tuple[str, str]] = {}
        for name in sorted(set(names)):
            if self.manager.has_plugin(name):
                chosen[name] = self._origins[name]
                continue
            if name in self.extra:
                plugin, origin = self.extra[name], ("(given)", "0")
            else:
                entry = self.pick(STRATEGIES, name)
                plugin, origin = self.load(entry), (entry.distribution, entry.version)
            register(self.manager, plugin, name, origin)
            chosen[name] = self._origins[name] = origin
        return chosen

    def model(self, name: str) -> tuple[ModelSpec, tuple[str, str]]:
        """The adapter of that name and its (distribution, version)."""
        if name in self.extra_models:
            return owned_spec(self.extra_models[name], ("(given)", "0")), ("(given)", "0")
        plugin = self.pick(MODELS, name)
        module = self.load(plugin)
        manager = pluggy.PluginManager(hookspecs.PROJECT)
        manager.add_hookspecs(hookspecs)
        origin = (plugin.distribution, plugin.version)
        register(manager, module, name, origin, only=False)
        try:
            with contained():
                specs = manager.hook.xdit_model()
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise PluginError(
                f"model {name} of {plugin.distribution} {plugin.version} failed in xdit_model: {type(error).__name__}: "
                f"{error}."
            ) from error
        if len(specs) != 1 or not isinstance(specs[0], ModelSpec):
            raise PluginError(
                f"model {name} of {plugin.distribution} must return one ModelSpec from xdit_model; it returned {specs}."
            )
        check_record(specs[0], ModelSpec, Owner("adapter", name, *origin), "xdit_model")
        return owned_spec(specs[0], origin), origin

    def model_for(self, pipeline: str) -> tuple[ModelSpec, tuple[str, str]]:
        """The adapter for a class of pipelines; a bundled checkpoint's own adapter is not one for others.

        Raises:
            UsageError: there is none, or several.
        """
        fitting = []
        for name in self.names(MODELS):
            with contextlib.suppress(PluginError, UsageError):  # a broken adapter must not harm the others
                spec, origin = self.model(name)
                if pipeline in spec.checkpoint.pipelines and not spec.checkpoint.path:
                    fitting.append((spec, origin))
        if len(fitting) != 1:
            which = "several adapters fit" if fitting else "no installed adapter fits"
            names = ", ".join(spec.name for spec, _ in fitting) or ", ".join(self.names(MODELS))
            raise UsageError(f"model=auto: {which} a {pipeline}; give model= with one of {names}.")
        return fitting[0]

    def implements(self, name: str, hook: str) -> bool:
        """Whether a selected plugin has a hook."""
        callers = self.manager.get_hookcallers(self.manager.get_plugin(name)) or ()
        return any(caller.name == hook for caller in callers)

    def call(self, hook: str, arguments: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Call one hook of each plugin named in ``arguments``, each with its own arguments.

        Returns:
            Plugin name to result, without the plugins that do not have the hook.

        Raises:
            PluginError: the hook raised; names the plugin.
        """
        results: dict[str, Any] = {}
        everyone = dict(self.manager.list_name_plugin())
        for name, kwargs in arguments.items():
            caller = self.manager.subset_hook_caller(hook, [p for n, p in everyone.items() if n != name])
            try:
                with (
                    contextlib.nullcontext() if hook == "xdit_build" else contained()
                ):  # which may take long, and talk to other ranks
                    answers: Sequence[Any] = [list(a) if inspect.isgenerator(a) else a for a in caller(**kwargs)]
            except (PluginError, UsageError, KeyboardInterrupt):
                raise
            except (Exception, SystemExit) as error:
                owner = Owner("plugin", name, *self._origins[name])
                raise PluginError(
                    f"{owner} failed in {hook}: {type(error).__name__}: {error}{line_of(error)}."
                ) from error
            if answers:
                results[name] = answers[0]
        return results


def register(
    manager: pluggy.PluginManager, plugin: object, name: str, origin: tuple[str, str], only: bool = True
) -> None:
    """Register a plugin under its name.

    Args:
        only: refuse functions that are marked as hooks and are none; an adapter may hold the hook of another adapter on
            which it builds.

    Raises:
        PluginError: a hook is misspelt, takes arguments that it is not given, or is not marked as one.
    """
    owner = Owner("plugin", name, *origin)
    try:
        manager.register(plugin, name=name)
        if only:
            manager.check_pending()  # a misspelt hook would otherwise be ignored
    except Exception as error:  # pluggy raises more than its own class
        reason = " ".join(str(error).split())
        raise PluginError(
            f"{owner} has a hook that does not fit: {reason}; compare with xdit_core/hookspecs.py."
        ) from error
    marked = {caller.name for caller in manager.get_hookcallers(plugin) or ()}
    for hook in (name for name in vars(hookspecs) if name.startswith("xdit_")):
        function = getattr(plugin, hook, None)
        if callable(function) and hook not in marked:
            raise PluginError(
                f"{owner} has a function {hook} without @hookimpl{place_of(function)}, which would be ignored; add it."
            )


def place_of(function: Any) -> str:
    """File and line of a function, in brackets; "" if they are not known."""
    code = getattr(function, "__code__", None)
    return f" ({code.co_filename}, line {code.co_firstlineno})" if code else ""
