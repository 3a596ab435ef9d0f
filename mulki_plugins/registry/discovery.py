"""Gathers what is registered: the built-in parts and those of every package with an entry point in the group `mulki`.

Each package is imported and asked on its own. One that fails is left out whole, with the cause, and the others are there.
"""

from __future__ import annotations

import functools
import inspect
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import pluggy

from mulki_plugins.errors import MulkiError, did_you_mean
from mulki_plugins.registry import builtin, hookspecs
from mulki_plugins.registry.guard import guarded
from mulki_plugins.registry.installed import Installed, installed
from mulki_plugins.registry.parts import Catalog, Package
from mulki_plugins.registry.register import Register
from mulki_plugins.registry.selection import VARIABLE, canonical, selection, switch_off
from mulki_plugins.registry.usable import leave_out_unusable

SLOW = 1.0
"""Seconds of loading after which a package is reported."""


@functools.cache
def catalog() -> Catalog:
    """Everything that is installed and not switched off. A package that fails is among the problems, not an error."""
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    result = Catalog()
    builtin.mulki_register(Register(result, builtin.PROVENANCE))
    chosen, there = selection(), installed()
    for each in there:
        package = Package(name=each.name, provenance=each.provenance, summary=each.summary)
        result.packages.append(package)
        if refusal := chosen.refusal((each.name, each.provenance.distribution)):
            package.state, package.cause = "switched off", refusal
        elif each.cause:
            package.state, package.cause = "left out", each.cause
        else:
            _join(result, package, each, manager)
    result.unknown += [f"{VARIABLE} names {_unknown(name, there)}" for name in _absent(chosen.only or (), there)]
    result.unknown += [f"--no-plugin names {_unknown(name, there)}" for name in _absent(chosen.without, there)]
    leave_out_unusable(result)
    return result


def leave_alone(names: Iterable[str]) -> None:
    """Switch packages off for the rest of this process. MulkiError where none is called so."""
    if switch_off(names):
        catalog.cache_clear()
        if wrong := [line for line in catalog().unknown if line.startswith("--")]:
            raise MulkiError(wrong[0], "`mulki plugins` shows the packages")


def _absent(names: Iterable[str], there: list[Installed]) -> list[str]:
    known = {canonical(name) for each in there for name in (each.name, each.provenance.distribution)}
    return [name for name in names if canonical(name) not in known]


def _unknown(name: str, there: list[Installed]) -> str:
    hint = did_you_mean(name, {each.provenance.distribution for each in there})
    return f"{name!r}, and no package with plugins is called that ({hint or 'there is none'})"


def _join(into: Catalog, package: Package, each: Installed, manager: pluggy.PluginManager) -> None:
    """Import one package and call its hook on a copy of the catalog, which is kept only where nothing went wrong."""
    attempt = Catalog(dict(into.parts), {kind: dict(files) for kind, files in into.files.items()}, dict(into.refused))
    light = "torch" not in sys.modules

    def ask() -> dict[str, Callable[..., Any]]:
        assert each.entry is not None
        hooks = _hooks(each.entry.load(), f"{package.provenance}: {package.name}", manager)
        if register := hooks.pop("mulki_register", None):
            register(register=Register(attempt, package.provenance))
        return hooks

    began = time.monotonic()
    outcome = guarded(ask)
    seconds = time.monotonic() - began
    if outcome.printed:
        package.notes.append(f"it printed while it was loaded: {outcome.printed}")
    if light and "torch" in sys.modules:
        package.notes.append("its hooks import torch, which makes every command slow; name targets by text")
    if seconds > SLOW:
        package.slow = f"takes {seconds:.1f} s to load, at every command"
        package.notes.append(f"it {package.slow}")
    if outcome.cause:
        package.state, package.cause = "left out", outcome.cause
        for key in attempt.parts.keys() - into.parts.keys():
            into.refused.setdefault(key, f"its package {package.provenance} is left out: {outcome.cause}")
        return
    package.hooks = outcome.value
    into.parts, into.files, into.refused = attempt.parts, attempt.files, attempt.refused


def _hooks(module: Any, name: str, manager: pluggy.PluginManager) -> dict[str, Callable[..., Any]]:
    """A package's hooks by name, each taking keyword arguments of which it is given those it asks for.

    MulkiError where it has none, or one that MulKI does not know or cannot call.
    """
    known = {hook: list(inspect.signature(spec).parameters) for hook, spec in _specs().items()}
    if not any(manager.parse_hookimpl_opts(module, attribute) for attribute in dir(module)):
        if written := [hook for hook in known if callable(getattr(module, hook, None))]:
            raise MulkiError(f"{written[0]} is not marked; write `@mulki_plugins.hookimpl` above it")
        raise MulkiError(f"it has no hook; expected a function `mulki_register(register)` in {_called(module)}")
    for attribute in dir(module):
        options = manager.parse_hookimpl_opts(module, attribute)
        if options is None:
            continue
        hook = options["specname"] or attribute
        if hook not in known:
            raise MulkiError(f"there is no hook {hook!r} ({did_you_mean(hook, known)})")
        if options["wrapper"] or options["hookwrapper"]:
            raise MulkiError(f"the hook {hook} is a wrapper, which MulKI does not call")
        _check_arguments(hook, known[hook], getattr(module, attribute))
    manager.register(module, name=name)
    found: dict[str, Callable[..., Any]] = {}
    for caller in manager.get_hookcallers(module) or []:
        for implementation in caller.get_hookimpls():
            if implementation.plugin is module:
                found[caller.name] = _given_what_it_takes(implementation.function, implementation.argnames)
    return found


def _specs() -> dict[str, Callable[..., Any]]:
    return {name: value for name, value in vars(hookspecs).items() if name.startswith("mulki_")}


def _check_arguments(hook: str, given: list[str], function: Callable[..., Any]) -> None:
    if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        raise MulkiError(f"the hook {hook} is a coroutine or generator, expected a plain function")
    for parameter in inspect.signature(function).parameters.values():
        fixed = parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        if parameter.name not in given or not fixed:
            raise MulkiError(
                f"the hook {hook} takes {parameter}, which MulKI does not give; write `def {hook}({', '.join(given)})`"
            )


def _given_what_it_takes(function: Callable[..., Any], names: Iterable[str]) -> Callable[..., Any]:
    return lambda **arguments: function(*(arguments[name] for name in names))


def _called(module: Any) -> str:
    return str(getattr(module, "__name__", module))
