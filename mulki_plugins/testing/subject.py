"""The plugin or stream under test: how to create it, what its registration declares, and which code its author wrote."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

from attrs import define, field, frozen

from mulki_plugins.registry.catalog import Kind, Part
from mulki_plugins.registry.discovery import catalog
from mulki_plugins.registry.guard import cause_of
from mulki_plugins.testing.small import small_model, small_reference

Factory = str | Callable[..., Any]

_LIBRARIES = {"avalanche", "torch", "builtins", "abc", "typing", "numpy", "attr", "attrs", "dataclasses"}
_MULKI = "mulki_plugins"


class Fault(Exception):
    """A failed check: the problem and its fix."""

    def __init__(self, problem: str, fix: str) -> None:
        super().__init__(problem)
        self.problem, self.fix = problem, fix


@frozen(eq=False)
class Subject:
    """A part that can be created repeatedly. part: its registration, None if it has none."""

    factory: Callable[..., Any]
    options: dict[str, Any]
    part: Part | None
    kind: Kind = "plugin"

    @property
    def name(self) -> str:
        name = getattr(self.factory, "__name__", type(self.factory).__name__)
        return f"{name} ({self.part.name})" if self.part else name

    def declared(self, fact: str) -> Any:
        """A fact of its registration, which knows those of its class; without one, of its class, else the default."""
        if self.part is not None:
            return getattr(self.part, fact)
        return getattr(self.factory, fact, () if fact in ("requires", "conflicts", "tasks") else False)

    def create(self) -> Any:
        """A new one. Fault if that fails."""
        options = dict(self.options)
        if self.part and self.part.kind == "plugin":
            options = {**self.part.defaults, **options}
            if self.part.needs_reference and "reference" not in options:
                options["reference"] = small_reference(small_model())
        try:
            return self.factory(**options)
        except (Exception, SystemExit) as error:
            arguments = ", ".join(f"{key}={value!r}" for key, value in self.options.items())
            raise Fault(
                f"{self.name}({arguments}) fails: {cause_of(error)}",
                "give every option a default or pass it to the check, and accept all options as keyword arguments",
            ) from error

    def stack(self, teachers: bool = False) -> Stack:
        """The plugins it requires, in order, followed by itself. teachers: add the teachers unless they conflict.

        An adapter has no place among the plugins, and an optimizer is made by the strategy.
        """
        if self.kind != "plugin":
            others = [Subject(catalog().find("plugin", "teachers").load(), {}, None).create()] if teachers else []
            subject = self.create() if self.kind == "adapter" else None
            return Stack(others, subject, [subject] if subject is not None else [])
        required: dict[str, Part] = {}
        for name in self.declared("requires"):
            _collect_required(name, required)
        name = self.part.name if self.part else ""
        if teachers and "teachers" not in (*required, *self.declared("conflicts"), name):
            required = {"teachers": catalog().find("plugin", "teachers"), **required}
        before = [Subject(part.load(), {}, part).create() for part in required.values() if part.name != name]
        plugin = self.create()
        return Stack([*before, plugin], plugin)


@define(eq=False)
class Stack:
    """Plugins in order, the model's adapters, and the one among them that is tested; None for an optimizer."""

    plugins: list[Any]
    subject: Any
    adapters: list[Any] = field(factory=list)


def _collect_required(name: str, into: dict[str, Part]) -> None:
    """Add a required plugin after the plugins that it requires in turn."""
    if name not in into:
        part = catalog().find("plugin", name)
        for other in part.requires:
            _collect_required(other, into)
        into[name] = part


def find_subject(kind: Kind, factory: Factory, options: dict[str, Any]) -> Subject:
    """The subject for a registered name, a class or a function; a class's or function's registration is looked up."""
    if isinstance(factory, str):
        part = catalog().find(kind, factory)
        return Subject(part.load(), options, part, kind)
    if not callable(factory):
        name = type(factory).__name__
        problem = f"expected a {kind}'s class, a function that creates one, or a registered name, got a {name}"
        raise TypeError(f"{problem}; give {name} itself, and its options as keyword arguments")
    return Subject(factory, options, _find_registration(kind, factory), kind)


def _find_registration(kind: Kind, factory: Callable[..., Any]) -> Part | None:
    target = f"{getattr(factory, '__module__', '')}:{getattr(factory, '__qualname__', '')}"
    for part in catalog().of_kind(kind):
        if part.target in (target, factory):
            return part
        if isinstance(part.target, str) and part.target.endswith(f":{getattr(factory, '__name__', '')}"):
            loaded = part.load() if inspect.getmodule(factory) else None
            if loaded is factory:
                return part
    return None


def author_modules(plugin: Any, factory: Callable[..., Any]) -> set[str]:
    """Names of the loaded modules that the plugin's author wrote: those that define it, and others of their packages.

    For MulKI's own plugins only the modules that define its classes, because the package also holds the kit.
    """
    modules = {_defining_module(kind) for kind in type(plugin).__mro__}
    modules.add(getattr(factory, "__module__", None) or "")
    modules = {name for name in modules if name and name.split(".")[0] not in _LIBRARIES}
    packages = {name.split(".")[0] for name in modules} - {_MULKI}
    modules |= {name for name in list(sys.modules) if name.split(".")[0] in packages}
    return {name for name in modules if sys.modules.get(name) is not None}


def author_classes(plugin: Any, modules: set[str]) -> list[type]:
    return [kind for kind in type(plugin).__mro__ if _defining_module(kind) in modules]


def _defining_module(kind: type) -> str:
    """The module that defines a class. A class created by calling `type` names "abc"; its methods know better."""
    if kind.__module__ != "abc":
        return kind.__module__
    return next((value.__module__ for value in vars(kind).values() if inspect.isfunction(value)), "")
