"""Collects the built-in parts and those of every installed package with an entry point in the group `mulki`.

Each package is imported and called on its own. A package that fails is left out as a whole, with the cause; the others stay.
`MULKI_PLUGINS=a,b` selects packages (empty: none), and `--no-plugin NAME` switches one off. NAME is that of the
distribution or of the entry point; `-`, `_` and capitals make no difference.
"""

from __future__ import annotations

import copy
import functools
import graphlib
import inspect
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import (
    Distribution,
    EntryPoint,
    PackageNotFoundError,
    distribution,
    distributions,
    entry_points,
    version,
)
from types import ModuleType
from typing import Any

import pluggy
from attrs import frozen

from mulki_plugins import __version__
from mulki_plugins.errors import MulkiError, did_you_mean
from mulki_plugins.registry import builtin, hookspecs
from mulki_plugins.registry.catalog import Catalog, Package, Provenance
from mulki_plugins.registry.guard import cause_of, try_call
from mulki_plugins.registry.hookspecs import PROJECT, Event, Run
from mulki_plugins.registry.register import Register

VARIABLE = "MULKI_PLUGINS"
SLOW = 1.0
"""Seconds of loading above which a package is reported."""

_off: tuple[str, ...] = ()
"""The packages that `--no-plugin` switches off."""


@functools.cache
def catalog() -> Catalog:
    """Everything that is installed and not switched off. A package that fails is listed as a problem, not raised."""
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(hookspecs)
    result = Catalog()
    builtin.mulki_register(Register(result, builtin.PROVENANCE))
    installed, selected = find_installed(), _selected()
    for each in installed:
        package = Package(name=each.name, provenance=each.provenance, summary=each.summary)
        result.packages.append(package)
        if each.names & set(map(_canonical, _off)):
            package.state, package.cause = "switched off", "by --no-plugin"
        elif selected is not None and not each.names & set(map(_canonical, selected)):
            package.state, package.cause = "switched off", f"by {VARIABLE}"
        elif each.cause:
            package.state, package.cause = "left out", each.cause
        else:
            _add_package(result, package, each, manager)
    for origin, names in ((VARIABLE, selected or ()), ("--no-plugin", _off)):
        result.unknown += [f"{origin} names {line}" for line in _unknown(names, installed)]
    _leave_out_unusable(result)
    return result


def ignore_packages(names: Iterable[str]) -> None:
    """Ignore these packages, and no others, for the rest of this process. MulkiError if one is not installed."""
    global _off
    before, _off = _off, tuple(names)
    if before != _off:
        catalog.cache_clear()
        if unknown := [line for line in catalog().unknown if line.startswith("--")]:
            raise MulkiError(unknown[0], "`mulki plugins` shows the packages")


def ignored_packages() -> tuple[str, ...]:
    """The packages that this process ignores, as `--no-plugin` names them."""
    return _off


def call_run_hooks(event: Event, run: Run, warn: Callable[[str, BaseException | None], None]) -> None:
    """Call that hook of every package, with a copy of `run`. `warn` gets a line, and the error, if one fails or prints."""
    for package in catalog().packages:
        if hook := package.hooks.get(event):
            outcome, what = try_call(hook, run=copy.deepcopy(run)), f"the hook {event} of {package.provenance}"
            if outcome.cause:
                warn(f"{what} failed; the run is not affected: {outcome.cause}", outcome.error)
            if outcome.printed:
                warn(f"{what} printed: {outcome.printed}", None)


def _selected() -> tuple[str, ...] | None:
    """The packages that the environment selects; None for all."""
    value = os.environ.get(VARIABLE)
    return None if value is None else tuple(name.strip() for name in value.split(",") if name.strip())


def _unknown(names: Iterable[str], installed: list[Installed]) -> Iterator[str]:
    known = {name for each in installed for name in each.names}
    for name in names:
        if _canonical(name) not in known:
            hint = did_you_mean(name, {each.provenance.distribution for each in installed})
            yield f"{name!r}, but no package with plugins has that name ({hint or 'none is installed'})"


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _leave_out_unusable(catalog: Catalog) -> None:
    """Remove plugins whose requirements are missing, conflict or form a circle, until no such plugin is left."""
    while unusable := _unusable(catalog):
        for name, cause in unusable.items():
            part = catalog.parts.pop(("plugin", name))
            catalog.left_out.append((part, cause))
            catalog.refused["plugin", name] = f"{part.provenance}: {cause}"


def _unusable(catalog: Catalog) -> dict[str, str]:
    plugins = {part.name: part for part in catalog.of_kind("plugin")}
    causes = {}
    for name, part in plugins.items():
        if missing := [other for other in part.requires if other not in plugins]:
            reason = catalog.refused.get(("plugin", missing[0]), "")
            causes[name] = f"it needs the plugin {missing[0]!r}, which is not there" + (reason and f" ({reason})")
        elif both := [other for other in part.requires if other in part.conflicts]:
            causes[name] = f"it both requires the plugin {both[0]!r} and conflicts with it"
    order = {name: [o for o in (*p.requires, *p.after) if o in plugins] for name, p in plugins.items()}
    try:
        graphlib.TopologicalSorter(order).prepare()
    except graphlib.CycleError as error:
        circle = error.args[1][:0:-1]  # each plugin, then one that it needs
        for i, name in enumerate(circle):
            way = " needs ".join(map(repr, [*circle[i:], *circle[:i], name]))
            causes.setdefault(name, f"a circle: {way}; none of them can come first")
    return causes


def _add_package(catalog: Catalog, package: Package, installed: Installed, manager: pluggy.PluginManager) -> None:
    """Import a package and call its hook on a copy of the catalog, which is kept only if nothing goes wrong."""
    attempt = Catalog(
        dict(catalog.parts), {k: dict(files) for k, files in catalog.files.items()}, dict(catalog.refused)
    )
    light = "torch" not in sys.modules

    def load() -> dict[str, Callable[..., Any]]:
        assert installed.entry is not None
        hooks = _find_hooks(installed.entry.load(), f"{package.provenance}: {package.name}", manager)
        if register := hooks.pop("mulki_register", None):
            register(register=Register(attempt, package.provenance))
        return hooks

    began = time.monotonic()
    outcome = try_call(load)
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
        for key in attempt.parts.keys() - catalog.parts.keys():
            catalog.refused.setdefault(key, f"its package {package.provenance} is left out: {outcome.cause}")
        return
    package.hooks = outcome.value
    catalog.parts, catalog.files, catalog.refused = attempt.parts, attempt.files, attempt.refused


def _find_hooks(module: ModuleType, name: str, manager: pluggy.PluginManager) -> dict[str, Callable[..., Any]]:
    """A package's hooks by name; each is called with all keyword arguments and receives those it takes.

    MulkiError if it has no hook, an unknown one, or one with arguments that MulKI does not pass.
    """
    known = {hook: list(inspect.signature(spec).parameters) for hook, spec in hookspecs.specs().items()}
    options = {name: o for name in dir(module) if (o := manager.parse_hookimpl_opts(module, name)) is not None}
    if not options:
        if written := [hook for hook in known if callable(getattr(module, hook, None))]:
            raise MulkiError(f"{written[0]} is not marked; write `@mulki_plugins.hookimpl` above it")
        home = getattr(module, "__name__", module)
        raise MulkiError(f"it has no hook; expected a function `mulki_register(register)` in {home}")
    for attribute, option in options.items():
        hook = option["specname"] or attribute
        if hook not in known:
            raise MulkiError(f"there is no hook {hook!r} ({did_you_mean(hook, known)})")
        if option["wrapper"] or option["hookwrapper"]:
            raise MulkiError(f"the hook {hook} is a wrapper, which MulKI does not call")
        _check_arguments(hook, known[hook], getattr(module, attribute))
    manager.register(module, name=name)
    return {
        caller.name: _pass_arguments(implementation.function, implementation.argnames)
        for caller in manager.get_hookcallers(module) or []
        for implementation in caller.get_hookimpls()
        if implementation.plugin is module
    }


def _pass_arguments(function: Callable[..., Any], names: Iterable[str]) -> Callable[..., Any]:
    return lambda **arguments: function(*(arguments[name] for name in names))


def _check_arguments(hook: str, given: list[str], function: Callable[..., Any]) -> None:
    if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        raise MulkiError(f"the hook {hook} is a coroutine or generator, expected an ordinary function")
    for parameter in inspect.signature(function).parameters.values():
        fixed = parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        if parameter.name not in given or not fixed:
            expected = f"`def {hook}({', '.join(given)})`"
            raise MulkiError(f"the hook {hook} takes {parameter}, which MulKI does not give; write {expected}")


@frozen(kw_only=True)
class Installed:
    """A package with an entry point. `cause`: why it cannot be used, if its metadata already shows that."""

    name: str
    entry: EntryPoint | None
    provenance: Provenance
    summary: str = ""
    cause: str = ""

    @property
    def names(self) -> set[str]:
        """The names that select it or switch it off."""
        return {_canonical(self.name), _canonical(self.provenance.distribution)}


def find_installed() -> list[Installed]:
    """Every entry point of the group `mulki`, sorted by name, read from metadata without importing the packages."""
    entries: list[EntryPoint] = []
    broken: list[Installed] = []
    try:
        entries += entry_points(group=PROJECT)
    except Exception:  # the metadata of some package, which need not concern MulKI, cannot be read
        for package in distributions():
            try:
                entries += package.entry_points.select(group=PROJECT)
            except Exception as error:
                provenance, cause = _provenance(package), f"its entry_points.txt cannot be read: {cause_of(error)}"
                broken.append(Installed(name=provenance.distribution, entry=None, provenance=provenance, cause=cause))
    installed = [*map(_read_metadata, entries), *broken]
    return sorted(installed, key=lambda each: (each.name, str(each.provenance)))


def _provenance(package: Distribution) -> Provenance:
    try:
        return Provenance(distribution=str(package.metadata["Name"]), version=str(package.version))
    except Exception:  # unreadable metadata
        return Provenance(distribution="an unnamed package", version="")


def _read_metadata(entry: EntryPoint) -> Installed:
    provenance, summary, cause = Provenance(distribution=entry.name, version=""), "", ""
    try:
        if entry.dist is not None:
            metadata = entry.dist.metadata
            name, number = metadata["Name"] or entry.name, metadata["Version"] or ""
            provenance, summary = Provenance(distribution=name, version=number), metadata["Summary"] or ""
            cause = _incompatibility(metadata.get_all("Requires-Dist") or [], metadata["Requires-Python"] or "")
    except Exception as error:  # unreadable metadata
        cause = f"its metadata cannot be read: {cause_of(error)}"
    if not cause and EntryPoint.pattern.match(entry.value) is None:
        cause = f"its entry point is {entry.value!r}, expected `package.module`"
    return Installed(name=entry.name, entry=entry, provenance=provenance, summary=summary, cause=cause)


def unmet_requirements(package: str) -> list[tuple[str, str]]:
    """What is wrong with each requirement of an installed distribution that is not met, and the command that helps."""
    try:
        requirements = distribution(package).requires or []
    except Exception:  # a checkout that was never installed, or unreadable metadata
        return []
    lines = []
    for text in requirements:
        try:
            missing = _unmet(text)
        except ValueError:  # not a requirement
            continue
        if missing is not None:
            requirement, found = missing
            what = f" {requirement.specifier}, found {found}" if found else ", which is not installed"
            lines.append((f"{package} needs {requirement.name}{what}", f"pip install '{requirement}'"))
    return lines


def _incompatibility(requirements: list[str], python: str) -> str:
    """Why a package does not work with this MulKI or this Python, by its own metadata; empty if it does."""
    ours = [text for text in requirements if text.lower().startswith(PROJECT)]
    for text in [*ours, f"python {python}"] if python else ours:
        missing = _unmet(text)
        if missing is not None and (name := missing[0].name.lower()) in _VERSIONS:
            name = name.replace("python", "Python")
            return f"it needs {name} {missing[0].specifier}, this is {name} {missing[1]}"
    return ""


_VERSIONS = {PROJECT: __version__, "python": platform.python_version()}


def _unmet(text: str) -> tuple[Any, str] | None:
    """A requirement that applies and is not met, and the version found; None if it is met. ValueError for another text.

    Read with `packaging`, which MulKI's dependencies bring; without it nothing is checked.
    """
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return None
    requirement = Requirement(text)
    if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
        return None
    try:
        found = _VERSIONS.get(requirement.name.lower()) or version(requirement.name)
    except PackageNotFoundError:
        found = ""
    return None if found and requirement.specifier.contains(found, prereleases=True) else (requirement, found)
