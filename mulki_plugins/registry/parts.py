"""A part is anything that is registered under a name: what a recipe names, and the commands of `mulki`."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from attrs import define, field, frozen

from mulki_plugins.errors import MulkiError, OptionError, did_you_mean
from mulki_plugins.libraries import import_libraries
from mulki_plugins.registry.guard import called

Kind = Literal["plugin", "stream", "model", "metric", "logger", "command"]
Files = Literal["recipes", "strategies"]
Target = str | Callable[..., Any]

OURS = "mulki"
"""The distribution of the built-in parts."""


@frozen(kw_only=True)
class Provenance:
    """The distribution that brought something, and its version."""

    distribution: str
    version: str

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}".rstrip()


@frozen(kw_only=True)
class Part:
    """A name and what it stands for. Nothing is imported before `load`."""

    kind: Kind
    name: str
    target: Target
    summary: str
    provenance: Provenance
    source: str = ""
    """The paper or page that it follows."""
    defaults: Mapping[str, Any] = field(factory=dict)
    """Options that are passed unless a recipe says otherwise, for classes that were not written for MulKI."""
    kinds: Mapping[str, Any] = field(factory=dict)
    """The types of options whose own code names none, or wider ones than a recipe can hold."""
    options: Mapping[str, str] = field(factory=dict)
    """A line on each option, for the reference and for editors."""
    requires: tuple[str, ...] = ()
    """Plugins without which it does not work, and which must stand before it."""
    conflicts: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    """Other plugins that must stand before it in a stack, where they are in it."""
    keeps_images: bool = False
    needs_reference: bool = False
    adds_parameters: bool = False
    no_resume: str = ""
    """Why a run with this plugin cannot go on from a checkpoint."""
    sequential: bool = False
    """Of a plugin: it works from one task to the next; of a metric: it compares moments of the stream."""
    tasks: tuple[str, ...] = ()
    """For a stream whose tasks are fixed: their names, so that a recipe's `per_task` can be checked."""
    extra: str = ""
    """The optional dependencies that it needs, as in `mulki[mini]`."""
    check: Target | None = None
    """What looks for mistakes that no option's type shows: from the options to a list of OptionError, without torch."""

    def load(self) -> Callable[..., Any]:
        """The class or function itself. MulkiError where its package cannot be imported.

        What a module prints while it is imported goes to stderr, so that it spoils no result. Only a command's brings no torch.
        """
        if self.kind != "command":
            import_libraries()
        return self._loaded(self.target)

    def problems(self, options: Mapping[str, Any]) -> list[OptionError]:
        """What its own check says of these options, whose types are right. MulkiError where it cannot be imported or fails."""
        if self.check is None:
            return []
        check = self._loaded(self.check)
        if self.is_ours:
            return list(check(options))
        what = f"the check of the {self.kind} {self.name!r} of {self.provenance}"
        found = called(f"{what} failed", check, copy.deepcopy(dict(options)))
        if not isinstance(found, (list, tuple)) or not all(isinstance(each, OptionError) for each in found):
            raise MulkiError(f"{what} cannot be used: expected a list of OptionError, got {type(found).__name__}")
        return list(found)

    @property
    def is_ours(self) -> bool:
        """Whether it comes with MulKI."""
        return self.provenance.distribution == OURS

    @property
    def package(self) -> str:
        """The top-level package of its code."""
        module = self.target if isinstance(self.target, str) else str(getattr(self.target, "__module__", ""))
        return module.partition(":")[0].partition(".")[0]

    def __str__(self) -> str:
        """`plugin 'x' of good 1.2`, for messages."""
        return f"{self.kind} {self.name!r}" + ("" if self.is_ours else f" of {self.provenance}")

    def _loaded(self, target: Target) -> Callable[..., Any]:
        if not isinstance(target, str):
            return target
        module, _, attribute = target.partition(":")
        what = f"the {self.kind} {self.name!r} of {self.provenance} cannot be loaded from {target}"
        found: Callable[..., Any] = called(what, lambda: getattr(importlib.import_module(module), attribute))
        return found


@define(kw_only=True)
class Package:
    """One entry point: who brought it, and what became of it."""

    name: str
    provenance: Provenance
    summary: str = ""
    state: Literal["ok", "left out", "switched off"] = "ok"
    cause: str = ""
    """Why it is left out or switched off, on one line."""
    notes: list[str] = field(factory=list)
    """What its author should know, though nothing is broken by it."""
    slow: str = ""
    """How long it took to load, if that was long."""
    hooks: dict[str, Callable[..., Any]] = field(factory=dict)
    """Its hooks that are called when a run starts or ends."""


@define
class Catalog:
    """Every part and every YAML file that is installed, and what became of each package."""

    parts: dict[tuple[Kind, str], Part] = field(factory=dict)
    files: dict[Files, dict[str, tuple[Path, Provenance]]] = field(factory=lambda: {"recipes": {}, "strategies": {}})
    refused: dict[tuple[Kind, str], str] = field(factory=dict)
    """Names that somebody may look for, and why there is no such part."""
    packages: list[Package] = field(factory=list)
    left_out: list[tuple[Part, str]] = field(factory=list)
    """Parts of packages that are otherwise fine, and why they cannot be used."""
    unknown: list[str] = field(factory=list)
    """What was said of packages that are not there."""

    @property
    def problems(self) -> list[str]:
        """A line for everything that went wrong while the parts were gathered."""
        packages = [f"{p.provenance} is left out: {p.cause}" for p in self.packages if p.state == "left out"]
        parts = [f"the {p.kind} {p.name!r} of {p.provenance} is left out: {cause}" for p, cause in self.left_out]
        return [*self.unknown, *packages, *parts]

    def of_kind(self, kind: Kind) -> list[Part]:
        return sorted((part for part in self.parts.values() if part.kind == kind), key=lambda part: part.name)

    def find(self, kind: Kind, name: str) -> Part:
        """The part of that name; MulkiError with what may have been meant, or why there is none."""
        if part := self.parts.get((kind, name)):
            return part
        if reason := self.refused.get((kind, name)):
            raise MulkiError(f"the {kind} {name!r} cannot be used: {reason}")
        hint = did_you_mean(name, [part.name for part in self.of_kind(kind)])
        raise MulkiError(
            f"no {kind} is named {name!r} ({hint}); `mulki list {kind}s` shows all{self.hint_at_packages()}"
        )

    def hint_at_packages(self) -> str:
        """For the end of an error about a name that is not there, which a package that is left out may have had."""
        absent = [str(package.provenance) for package in self.packages if package.state != "ok"]
        return f"; without {', '.join(absent)} (see `mulki plugins`)" if absent else ""
