"""What is tested: a plugin with its options, and what its registration says of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from attrs import define, frozen

from mulki_plugins.registry.catalog import Kind, Part
from mulki_plugins.registry.discovery import catalog
from mulki_plugins.registry.guard import cause_of
from mulki_plugins.testing.world import small_model, small_reference

Factory = str | Callable[..., Any]


class Fault(Exception):
    """What is wrong, and how to fix it."""

    def __init__(self, wrong: str, mend: str) -> None:
        super().__init__(wrong)
        self.wrong, self.mend = wrong, mend


@frozen(eq=False)
class Subject:
    """A plugin or stream that can be made again and again. Without a registration nothing is declared of it."""

    factory: Callable[..., Any]
    options: dict[str, Any]
    part: Part | None

    @property
    def name(self) -> str:
        called = getattr(self.factory, "__name__", type(self.factory).__name__)
        return f"{called} ({self.part.name})" if self.part else called

    def declared(self, what: str) -> Any:
        """A field of its registration, or an attribute of its class; what it is by default where there is neither."""
        found = getattr(self.part, what) if self.part else None
        default: Any = () if what in ("requires", "conflicts", "tasks") else False
        return found or getattr(self.factory, what, default)

    def made(self) -> Any:
        """A new one. Fault where it cannot be made."""
        options = dict(self.options)
        if self.part and self.part.kind == "plugin":
            options = {**self.part.defaults, **options}
            if self.part.needs_reference and "reference" not in options:
                options["reference"] = small_reference(small_model())
        try:
            return self.factory(**options)
        except (Exception, SystemExit) as error:
            said = ", ".join(f"{key}={value!r}" for key, value in self.options.items())
            raise Fault(
                f"{self.name} cannot be made with ({said}): {cause_of(error)}",
                "give every option a default or give it to the check, and take all options as keyword arguments",
            ) from error

    def stack(self, teachers: bool = False) -> Stack:
        """The plugins that it requires, in order, and itself at the end. teachers: add them where they may stand there."""
        needed: dict[str, Part] = {}
        for name in self.declared("requires"):
            _gather(name, needed)
        own = self.part.name if self.part else ""
        if teachers and "teachers" not in (*needed, *self.declared("conflicts"), own):
            needed = {"teachers": catalog().find("plugin", "teachers"), **needed}
        before = [Subject(part.load(), {}, part).made() for part in needed.values() if part.name != own]
        subject = self.made()
        return Stack([*before, subject], subject)


@define(eq=False)
class Stack:
    """Plugins in their order, and the one among them that is tested."""

    plugins: list[Any]
    subject: Any


def _gather(name: str, into: dict[str, Part]) -> None:
    """A required plugin with what it requires before it."""
    if name not in into:
        part = catalog().find("plugin", name)
        for other in part.requires:
            _gather(other, into)
        into[name] = part


def subject_of(kind: Kind, factory: Factory, options: dict[str, Any]) -> Subject:
    """The subject of a check: a registered name, or a class or function, whose registration is looked up."""
    if isinstance(factory, str):
        part = catalog().find(kind, factory)
        return Subject(part.load(), options, part)
    if not callable(factory):
        what = f"expected a {kind}'s class, a function that makes one, or a registered name, got a {type(factory).__name__}"
        raise TypeError(what + f"; give {type(factory).__name__} itself, and its options as keyword arguments")
    return Subject(factory, options, _registration(kind, factory))


def _registration(kind: Kind, factory: Callable[..., Any]) -> Part | None:
    target = f"{getattr(factory, '__module__', '')}:{getattr(factory, '__qualname__', '')}"
    for part in catalog().of_kind(kind):
        if part.target in (target, factory):
            return part
        if isinstance(part.target, str) and part.target.endswith(f":{getattr(factory, '__name__', '')}"):
            loaded = part.load() if inspect.getmodule(factory) else None
            if loaded is factory:
                return part
    return None
