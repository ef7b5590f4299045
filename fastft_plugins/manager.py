"""Finds the plugins, isolates a broken one, lists them, and calls their hooks.

Three environment variables are read when the plugins are loaded, which is when a hook is first needed:
``FASTFT_PLUGINS`` ("a,b": only these; "-a": all but these; the built-in one always stays), ``FASTFT_TRACE=1`` (log
every hook call) and ``FASTFT_STRICT_PLUGINS=1`` (a plugin that fails to load raises).
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version
from typing import Any, Literal

import pluggy

from fastft_plugins import hookspecs
from fastft_plugins.errors import FastFTError
from fastft_plugins.tracing import trace_hook_calls
from fastft_plugins.variables import is_set

logger = logging.getLogger("fastft")

BUILT_IN = "built-in"
# Our adapters' packages, and their names as plugins. pluggy asks the last registered plugin first, and a TRL trainer
# is an HF Trainer too, so TRL comes after HF.
OWN_ADAPTERS = {"fastft_hf": "hf", "fastft_lightning": "lightning", "fastft_trl": "trl"}


@dataclass(frozen=True)
class PluginStatus:
    """One plugin as ``fastft plugins`` lists it."""

    name: str
    source: str  # the distribution that brings it, or "built-in", "source tree", "registered by code"
    version: str | None = None
    state: Literal["loaded", "failed", "disabled"] = "loaded"
    error: str | None = None
    hooks: tuple[str, ...] = ()


class PluginManager:
    """The registered plugins. Nothing is imported until `hook`, `statuses` or another member is first used."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._pluggy: pluggy.PluginManager | None = None
        self._statuses: list[PluginStatus] = []
        self.generation = 0  # grows with every change, so that answers of the hooks can be remembered

    @property
    def hook(self) -> pluggy.HookRelay:
        """pluggy's relay: ``manager.hook.fastft_matches(target=trainer)`` asks every plugin."""
        return self._ready().hook

    @property
    def statuses(self) -> list[PluginStatus]:
        """Every plugin found, in the order of loading, the failed and the disabled ones included."""
        self._ready()
        return list(self._statuses)

    def register(self, plugin: object, name: str | None = None) -> str:
        """Add a plugin from code and return its name; a plugin that does not fit the hooks raises."""
        manager = self._ready()
        name = name or manager.get_canonical_name(plugin)
        self._add(plugin, PluginStatus(name, "registered by code"))
        return name

    def unregister(self, plugin_or_name: object) -> None:
        """Remove a plugin, given itself or its name."""
        manager = self._ready()
        name = plugin_or_name if isinstance(plugin_or_name, str) else manager.get_name(plugin_or_name)
        if name is None or not manager.has_plugin(name):
            known = ", ".join(name for name, _ in manager.list_name_plugin())
            raise ValueError(f"{plugin_or_name!r} is not a registered plugin; registered: {known}")
        manager.unregister(name=name)
        self.generation += 1
        self._statuses = [one for one in self._statuses if (one.name, one.state) != (name, "loaded")]

    def call_each(self, hook_name: str, **arguments: Any) -> list[tuple[str, Any]]:
        """Call each plugin's implementation by itself, so that a failing plugin does not hide the others' results.

        Returns (plugin name, result) in pluggy's order, with the exception in place of the result where one was
        raised. A None, pluggy's "nothing to say", is left out.
        """
        manager = self._ready()
        implementations = getattr(manager.hook, hook_name).get_hookimpls()
        # Wrappers of other plugins stay in place around each call.
        names = {impl.plugin_name: impl.plugin for impl in reversed(implementations) if not _is_wrapper(impl)}
        results: list[tuple[str, Any]] = []
        for name in names:
            caller = manager.subset_hook_caller(hook_name, [other for key, other in names.items() if key != name])
            try:
                result = caller(**arguments)
            except Exception as error:
                results.append((name, error))
                continue
            several = result if isinstance(result, list) and not _is_firstresult(caller) else [result]
            results += [(name, one) for one in several if one is not None]
        return results

    def _ready(self) -> pluggy.PluginManager:
        with self._lock:
            if self._pluggy is None:
                self._pluggy = pluggy.PluginManager("fastft")  # set first: a plugin may ask for the manager
                self._statuses = []
                try:
                    self._load(self._pluggy)
                except BaseException:
                    self._pluggy = None
                    raise
            return self._pluggy

    def _load(self, manager: pluggy.PluginManager) -> None:
        manager.add_hookspecs(hookspecs)
        if is_set("FASTFT_TRACE"):
            trace_hook_calls(manager, logger)
        built_in = importlib.import_module("fastft_plugins.builtin")
        self._add(built_in, PluginStatus(BUILT_IN, BUILT_IN, _own_version()))
        candidates = list(_candidates())
        is_selected = _selection({status.name for status, _ in candidates})
        for status, load in candidates:
            if not is_selected(status.name):
                self._statuses.append(replace(status, state="disabled"))
                continue
            try:
                self._add(load(), status)
            except (Exception, SystemExit) as error:  # SystemExit: a plugin may be a script that exits when imported
                message = (
                    f"{type(error).__name__}: {' '.join(str(error).split())}"  # on one line: pluggy writes several
                )
                if is_set("FASTFT_STRICT_PLUGINS"):
                    raise FastFTError(f"plugin {status.name!r} ({status.source}) failed to load: {message}") from error
                logger.warning("plugin %r (%s) is left out, it failed to load: %s", status.name, status.source, message)
                self._statuses.append(replace(status, state="failed", error=message))

    def _add(self, plugin: object, status: PluginStatus) -> None:
        manager = self._ready()
        hash(plugin)  # pluggy keeps plugins in sets: an unhashable one would only fail at the first call
        if manager.has_plugin(status.name) or manager.is_registered(plugin):
            raise ValueError(f"the name {status.name!r} or the plugin behind it is registered already")
        try:
            manager.register(plugin, status.name)
            manager.check_pending()  # a misspelled hook name would otherwise never be called, and nobody told
        except BaseException:
            manager.unregister(name=status.name)  # pluggy keeps the hooks it had accepted before the bad one
            raise
        hooks = sorted(caller.name for caller in manager.get_hookcallers(plugin) or ())
        self._statuses.append(replace(status, hooks=tuple(hooks)))
        self.generation += 1


_manager: PluginManager | None = None
_manager_lock = threading.Lock()


def get_plugin_manager() -> PluginManager:
    """Return the manager of this process, made on first use."""
    global _manager
    with _manager_lock:
        if _manager is None:
            _manager = PluginManager()
        return _manager


def _candidates() -> Iterator[tuple[PluginStatus, Callable[[], object]]]:
    """Yield each plugin that could be loaded, our own adapters first, so that third parties are asked before them."""
    entries = entry_points(group="fastft")
    found = {_package(entry): entry for entry in entries}
    for package, name in OWN_ADAPTERS.items():
        if package in found:
            yield _from_entry(found[package])
        elif importlib.util.find_spec(package) is not None:  # used from a source tree, without installed entry points
            yield (
                PluginStatus(name, "source tree", _own_version()),
                partial(importlib.import_module, f"{package}.plugin"),
            )
    third_party = [entry for entry in entries if _package(entry) not in OWN_ADAPTERS]
    yield from map(_from_entry, sorted(third_party, key=lambda entry: entry.name))


def _from_entry(entry: EntryPoint) -> tuple[PluginStatus, Callable[[], object]]:
    distribution = entry.dist
    if distribution is None:
        return PluginStatus(entry.name, "unknown distribution"), entry.load
    return PluginStatus(entry.name, distribution.name, distribution.version), entry.load


def _package(entry: EntryPoint) -> str:
    return entry.value.split(":")[0].split(".")[0].strip()


def _own_version() -> str | None:
    try:
        return version("fastft-plugins")
    except PackageNotFoundError:
        return None


def _selection(known: set[str]) -> Callable[[str], bool]:
    """Read FASTFT_PLUGINS: return whether a plugin of some name is to be loaded."""
    names = [name.strip() for name in os.environ.get("FASTFT_PLUGINS", "").split(",") if name.strip()]
    only = {name for name in names if not name.startswith("-")}
    without = {name[1:] for name in names if name.startswith("-")}
    for name in sorted((only - {BUILT_IN} | without) - known):
        remark = "is always on" if name == BUILT_IN else "is not installed"
        logger.warning("FASTFT_PLUGINS names %r, which %s; known: %s", name, remark, ", ".join(sorted(known)) or "none")
    return lambda name: (not only or name in only) and name not in without


def _is_wrapper(implementation: pluggy.HookImpl) -> bool:
    return implementation.wrapper or implementation.hookwrapper


def _is_firstresult(caller: pluggy.HookCaller) -> bool:
    return caller.spec is not None and bool(caller.spec.opts.get("firstresult"))
