"""Gathers what is registered: the built-in parts and those of every package with an entry point in the group `mulki`."""

from __future__ import annotations

import functools
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy

from mulki_plugins.registry import builtin, hookspecs
from mulki_plugins.registry.parts import Catalog, Provenance, Register


@functools.cache
def catalog() -> Catalog:
    """Everything that is installed. A package that cannot be loaded is a problem in the list, not an error."""
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    result = Catalog()
    _register(manager, "built-in", builtin, builtin.PROVENANCE, result)
    for entry in sorted(entry_points(group=hookspecs.PROJECT), key=lambda e: (e.name, e.value)):
        provenance = _provenance(entry)
        try:
            module = entry.load()
        except Exception as error:  # whatever a stranger's module raises must not stop the program
            result.problems.append(f"{provenance} cannot be loaded: {type(error).__name__}: {error}")
            continue
        _register(manager, f"{provenance}: {entry.name}", module, provenance, result)
    return result


def _provenance(entry: EntryPoint) -> Provenance:
    if entry.dist is None:
        return Provenance(distribution=entry.name, version="")
    return Provenance(distribution=entry.dist.name, version=entry.dist.version)


def _register(manager: pluggy.PluginManager, name: str, module: Any, provenance: Provenance, into: Catalog) -> None:
    """Call one package's hook on a copy of the catalog, which is kept only where nothing went wrong."""
    attempt = Catalog(
        dict(into.parts),
        {kind: list(paths) for kind, paths in into.folders.items()},
        refused=dict(into.refused),
    )
    try:
        manager.register(module, name=name)
        manager.check_pending()
        for implementation in manager.hook.mulki_register.get_hookimpls():
            if implementation.plugin is module:
                implementation.function(register=Register(attempt, provenance))
    except Exception as error:
        into.problems.append(f"{provenance} is left out: {type(error).__name__}: {error}")
        if manager.is_registered(module):
            manager.unregister(module)
        return
    into.parts, into.folders, into.refused = attempt.parts, attempt.folders, attempt.refused
