"""The parts that recipes and commands name, and the packages they come from."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from attrs import define, evolve, field, frozen

from mulki_plugins.errors import MulkiError, OptionError, did_you_mean
from mulki_plugins.libraries import import_libraries
from mulki_plugins.registry.guard import guarded_call
from mulki_plugins.registry.static import Signature, Target, read_signature

Kind = Literal["plugin", "adapter", "head", "optimizer", "stream", "model", "metric", "logger", "command"]
Files = Literal["recipes", "strategies", "studies"]

OURS = "mulki"
"""The distribution of the built-in parts."""


@frozen(kw_only=True)
class Provenance:
    """The distribution that something comes from, and its version."""

    distribution: str
    version: str

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}".rstrip()


@frozen(kw_only=True)
class Part:
    """A registered name and its target. Nothing is imported before `load`."""

    kind: Kind
    name: str
    target: Target
    summary: str
    provenance: Provenance
    source: str = ""
    """The paper or page that describes it."""
    defaults: Mapping[str, Any] = field(factory=dict)
    """Values for the options of a class that was not written for MulKI, unless a recipe sets them."""
    kinds: Mapping[str, Any] = field(factory=dict)
    """Types for options whose signature has no annotation, or one that YAML cannot express."""
    options: Mapping[str, str] = field(factory=dict)
    """A line of documentation for each option."""
    requires: tuple[str, ...] = field(default=(), converter=tuple)
    """Plugins that it does not work without; they stand before it in a stack."""
    conflicts: tuple[str, ...] = field(default=(), converter=tuple)
    after: tuple[str, ...] = field(default=(), converter=tuple)
    """Plugins that stand before it if they are in the stack."""
    keeps_images: bool = False
    needs_reference: bool = False
    adds_parameters: bool = False
    no_resume: str = ""
    """Why a run with this plugin cannot be resumed."""
    one_process: str = ""
    """Why a run with this plugin cannot be spread over several ranks; empty if it can."""
    sequential: bool = False
    """A plugin that works from one task to the next, or a metric that compares moments of the stream."""
    counts_images: bool = False
    """A metric that also takes the number of test images of each task."""
    classes: str = ""
    """The value of `evaluate.classes` that a metric is defined for; empty for any."""
    per_sample: bool = False
    """A plugin whose loss is a mean over the batch's samples, or does not depend on them, so that the batch may be split."""
    tasks: tuple[str, ...] = field(default=(), converter=tuple)
    """The task names of a stream whose tasks are fixed, so that a recipe's `per_task` can be checked."""
    extra: str = ""
    """The optional dependencies that it needs, as in `mulki[mini]`."""
    check: Target | None = None
    """A function from the options to a list of OptionError, for mistakes that types do not show; it needs no torch."""

    def load(self) -> Callable[..., Any]:
        """The class or function itself. MulkiError if its package cannot be imported.

        What a module prints during its import goes to stderr, out of the way of results.
        """
        if self.kind != "command":  # a command may do without torch
            import_libraries()
        return self._load(self.target)

    def problems(self, options: Mapping[str, Any]) -> list[OptionError]:
        """The mistakes that its own check finds in options of the right types. MulkiError if the check fails."""
        if self.check is None:
            return []
        check = self._load(self.check)
        if self.is_ours:
            return list(check(options))
        what = f"the check of the {self.kind} {self.name!r} of {self.provenance}"
        problems = guarded_call(f"{what} failed", check, copy.deepcopy(dict(options)))
        if not isinstance(problems, (list, tuple)) or not all(isinstance(each, OptionError) for each in problems):
            raise MulkiError(f"{what} cannot be used: expected a list of OptionError, got {type(problems).__name__}")
        return list(problems)

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

    def _load(self, target: Target) -> Callable[..., Any]:
        if not isinstance(target, str):
            return target
        module, _, attribute = target.partition(":")
        what = f"the {self.kind} {self.name!r} of {self.provenance} cannot be loaded from {target}"
        loaded: Callable[..., Any] = guarded_call(what, lambda: getattr(importlib.import_module(module), attribute))
        return loaded


_GIVEN_TO_OPTIMIZERS = ("lr", "weight_decay", "fused", "name_of")
"""The arguments of an optimizer that are no options of its own."""


def takes_decay(part: Part) -> bool:
    """Whether an optimizer has a weight decay; also if that cannot be read. MulkiError if its module cannot be found."""
    signature = read_signature(part.target)
    return signature.open or "weight_decay" in signature.options


def signature_of(part: Part) -> Signature:
    """The options that a recipe may give to a part. MulkiError if its module cannot be found or read."""
    signature = read_signature(part.target)
    options = {
        name: evolve(option, kind=part.kinds.get(name, option.kind))
        for name, option in signature.options.items()
        if not (part.needs_reference and name == "reference")  # declared by the recipe, once for all plugins
    }
    if part.kind == "optimizer":  # the first argument is what it trains
        options = {name: option for name, option in list(options.items())[1:] if name not in _GIVEN_TO_OPTIMIZERS}
    return evolve(signature, options=options)


@define(kw_only=True)
class Package:
    """An installed package with an entry point, and its state."""

    name: str
    provenance: Provenance
    summary: str = ""
    state: Literal["ok", "left out", "switched off"] = "ok"
    cause: str = ""
    """Why it is left out or switched off, on one line."""
    notes: list[str] = field(factory=list)
    """Advice for its author about things that break nothing."""
    slow: str = ""
    """How long it took to load, if that was long."""
    hooks: dict[str, Callable[..., Any]] = field(factory=dict)
    """Its hooks for the start and the end of a run."""


@define
class Catalog:
    """All parts and YAML files that are installed, and the state of each package."""

    parts: dict[tuple[Kind, str], Part] = field(factory=dict)
    files: dict[Files, dict[str, tuple[Path, Provenance]]] = field(
        factory=lambda: {kind: {} for kind in get_args(Files)}
    )
    refused: dict[tuple[Kind, str], str] = field(factory=dict)
    """Names that somebody may look for, and why there is no such part."""
    packages: list[Package] = field(factory=list)
    left_out: list[tuple[Part, str]] = field(factory=list)
    """Unusable parts of packages that are otherwise fine, and the cause."""
    unknown: list[str] = field(factory=list)
    """A line for each package that the user selects or switches off and that is not installed."""

    @property
    def problems(self) -> list[str]:
        """A line for everything that went wrong while the parts were collected."""
        packages = [f"{p.provenance} is left out: {p.cause}" for p in self.packages if p.state == "left out"]
        parts = [f"the {p.kind} {p.name!r} of {p.provenance} is left out: {cause}" for p, cause in self.left_out]
        return [*self.unknown, *packages, *parts]

    def of_kind(self, kind: Kind) -> list[Part]:
        """The parts of a kind, sorted by name."""
        return sorted((part for part in self.parts.values() if part.kind == kind), key=lambda part: part.name)

    def find(self, kind: Kind, name: str) -> Part:
        """The part of that name. MulkiError with the reason it is missing, or with a similar name."""
        if part := self.parts.get((kind, name)):
            return part
        if reason := self.refused.get((kind, name)):
            raise MulkiError(f"the {kind} {name!r} cannot be used: {reason}")
        hint = f"{did_you_mean(name, [part.name for part in self.of_kind(kind)])}); `mulki list {kind}s` shows all"
        raise MulkiError(f"no {kind} is named {name!r} ({hint}{self.hint_at_packages()}")

    def hint_at_packages(self) -> str:
        """The end of an error about an unknown name: packages that are left out may contain it."""
        absent = [str(package.provenance) for package in self.packages if package.state != "ok"]
        return f"; without {', '.join(absent)} (see `mulki plugins`)" if absent else ""
