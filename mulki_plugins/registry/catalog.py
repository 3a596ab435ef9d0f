"""The parts that recipes and commands name, the packages they come from, and how a package registers them."""

from __future__ import annotations

import contextlib
import copy
import importlib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from attrs import define, evolve, field, frozen

from mulki_plugins.errors import MulkiError, OptionError, did_you_mean
from mulki_plugins.libraries import import_libraries
from mulki_plugins.registry.guard import guarded_call
from mulki_plugins.registry.static import Signature, Target, read_attributes, read_docstring, read_signature

if TYPE_CHECKING:
    from importlib.abc import Traversable

Kind = Literal["plugin", "adapter", "stream", "model", "metric", "logger", "command"]
Files = Literal["recipes", "strategies"]

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
    sequential: bool = False
    """A plugin that works from one task to the next, or a metric that compares moments of the stream."""
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


def signature_of(part: Part) -> Signature:
    """The options that a recipe may give to a part. MulkiError if its module cannot be found or read."""
    signature = read_signature(part.target)
    options = {
        name: evolve(option, kind=part.kinds.get(name, option.kind))
        for name, option in signature.options.items()
        if not (part.needs_reference and name == "reference")  # declared by the recipe, once for all plugins
    }
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
    files: dict[Files, dict[str, tuple[Path, Provenance]]] = field(factory=lambda: {"recipes": {}, "strategies": {}})
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


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_TARGET = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
_FACTS: dict[str, type] = {
    "requires": list, "conflicts": list, "after": list, "keeps_images": bool, "needs_reference": bool,
    "adds_parameters": bool, "sequential": bool, "per_sample": bool, "no_resume": str, "paper": str,
}  # fmt: skip
"""The facts of a plugin that its class states as class attributes, with their types."""


@frozen
class Register:
    """The argument of a `mulki_register` hook: one method for each kind of part.

    Every part has a name, of letters, digits, `.`, `_` and `-`, that is unique among parts of its kind.
    target: a text `package.module:attribute`, which is imported when the part is used, or the object itself.
    summary: a line for lists; by default the first line of the target's docstring.
    options: a line for each option; by default the entries of the section `Args:` in the target's docstring.
    source: the paper or page that describes the part.
    Docstrings and class attributes are read without importing the target.
    """

    catalog: Catalog
    provenance: Provenance

    def plugin(
        self, name: str, target: Target, *, summary: str | None = None, source: str | None = None,
        options: Mapping[str, str] | None = None, defaults: Mapping[str, Any] | None = None,
        kinds: Mapping[str, Any] | None = None, requires: Sequence[str] | None = None,
        conflicts: Sequence[str] | None = None, after: Sequence[str] | None = None, keeps_images: bool | None = None,
        needs_reference: bool | None = None, adds_parameters: bool | None = None, sequential: bool | None = None,
        per_sample: bool | None = None, no_resume: str | None = None,
    ) -> None:  # fmt: skip
        """An Avalanche `SupervisedPlugin` class, or a function that returns one.

        defaults, kinds: values and types for the options of a class that was not written for MulKI.
        The rest are facts of the plugin. A class states them as class attributes of the same names (`paper` for source),
        and an argument overrides the attribute:
        requires: plugins that it does not work without; they stand before it in a stack.
        conflicts: plugins that it does not work with.
        after: plugins that stand before it if they are in the stack.
        keeps_images: it keeps images of past tasks.
        needs_reference: it takes a keyword argument `reference` (a `Reference`), which recipes do not list as an option.
        adds_parameters: it adds weights to the model.
        sequential: it does nothing, or fails, if all tasks are trained at once.
        per_sample: its loss is a mean over the batch's samples, or does not depend on them: `train.accumulate` may split it.
        no_resume: why a run with it cannot be resumed, if its `state_dict()` does not hold its whole state.
        """
        self._add(
            "plugin", name, target, summary, options, defaults=defaults, kinds=kinds, source=source,
            requires=requires, conflicts=conflicts, after=after, keeps_images=keeps_images, needs_reference=needs_reference,
            adds_parameters=adds_parameters, sequential=sequential, per_sample=per_sample, no_resume=no_resume,
        )  # fmt: skip

    def stream(
        self, name: str, target: Target, *, summary: str | None = None, source: str = "",
        options: Mapping[str, str] | None = None, tasks: Sequence[str] = (), extra: str = "", check: Target | None = None,
    ) -> None:  # fmt: skip
        """A function from options to a `TaskStream`.

        tasks: the names of its tasks if they are fixed, so that a recipe's `per_task` is checked before the stream is built.
        extra: the optional dependencies that it needs, as in `mulki[mini]`.
        check: a function from the options to a list of `OptionError`, for mistakes that types do not show. `mulki validate`
        calls it, so its module must not import torch.
        """
        self._add("stream", name, target, summary, options, source=source, tasks=tasks, extra=extra, check=check)

    def model(
        self, name: str, target: Target, *, summary: str | None = None, source: str = "",
        options: Mapping[str, str] | None = None, check: Target | None = None,
    ) -> None:  # fmt: skip
        """A function from options to a `LoadedClip`.

        check: a function from the options to a list of `OptionError`, as for a stream; its module must not import torch.
        """
        self._add("model", name, target, summary, options, source=source, check=check)

    def adapter(
        self, name: str, target: Target, *, summary: str | None = None, source: str | None = None,
        options: Mapping[str, str] | None = None, check: Target | None = None,
    ) -> None:  # fmt: skip
        """A subclass of `mulki_plugins.adapters.Adapter`, or a function that returns one: weights added inside a model.

        check: a function from the options to a list of `OptionError`, as for a stream; its module must not import torch.
        """
        self._add("adapter", name, target, summary, options, source=source, check=check)

    def metric(
        self, name: str, target: Target, *, summary: str | None = None, source: str = "", sequential: bool = True
    ) -> None:
        """A function from a copy of the accuracy matrix [T, T], in percent, to a finite number; if it fails, the run goes on.

        sequential: it compares moments of the stream, so it means nothing if all tasks are trained at once.
        """
        self._add("metric", name, target, summary, source=source, sequential=sequential)

    def logger(self, name: str, target: Target, *, summary: str | None = None, source: str = "") -> None:
        """A function from a run's folder to an Avalanche `BaseLogger`. A logger that fails is dropped; the run continues."""
        self._add("logger", name, target, summary, source=source)

    def command(self, name: str, target: Target, *, summary: str) -> None:
        """A `click.Command`, called as `mulki NAME`. summary: its line in `mulki --help`, which does not import it."""
        self._add("command", name, target, summary)

    def recipe(self, path: Path | str | Traversable) -> None:
        """A YAML file with a recipe, which is named after the file, without `.yaml`."""
        self._add_file("recipes", Path(str(path)))

    def strategy(self, path: Path | str | Traversable) -> None:
        """A YAML file with a strategy, which is named after the file, without `.yaml`."""
        self._add_file("strategies", Path(str(path)))

    def folder(self, kind: Files, path: Path | str | Traversable) -> None:
        """A folder of `*.yaml` files that are all recipes, or all strategies.

        `register.folder("strategies", importlib.resources.files("my_package") / "strategies")`.
        """
        if kind not in get_args(Files):
            raise MulkiError(f"register.folder: expected 'recipes' or 'strategies', got {kind!r}")
        folder = Path(str(path))
        if not folder.is_dir():
            raise MulkiError(f"register.folder: there is no folder {folder}")
        for file in sorted(folder.glob("*.yaml")):
            self._add_file(kind, file)

    def refuse(self, kind: Kind, name: str, reason: str) -> None:
        """Explain why there is no part of that name, to users who look for it."""
        self.catalog.refused[kind, name] = reason

    def _add(self, kind: Kind, name: str, target: Target, summary: Any, options: Any = None, **facts: Any) -> None:
        what = f"the {kind} {name!r} of {self.provenance}"
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise MulkiError(f"{what}: expected letters, digits, '.', '_' and '-', the first a letter or digit")
        if not (_TARGET.fullmatch(target) if isinstance(target, str) else callable(target)):
            got = repr(target) if isinstance(target, str) else f"a {type(target).__name__}"
            raise MulkiError(f"{what}: expected a target `package.module:attribute`, got {got}")
        if other := self.catalog.parts.get((kind, name)):
            raise MulkiError(f"{what} is already there, from {other.provenance}")
        line, documented, attributes = "", dict[str, str](), dict[str, Any]()
        if kind != "command":
            with contextlib.suppress(MulkiError):  # of a module that cannot be read: reported when the part is used
                line, documented = read_docstring(target)
                attributes = read_attributes(target, _FACTS) if kind in ("plugin", "adapter") else {}
        summary = line if summary is None else summary
        if not isinstance(summary, str) or not summary.strip() or "\n" in summary.strip():
            raise MulkiError(f"{what}: expected a summary of one line, or a docstring")
        facts = {**attributes, **{fact: value for fact, value in facts.items() if value is not None}}
        for fact, value in facts.items():
            expected = list if fact == "tasks" else _FACTS.get(fact, object)
            is_collection = isinstance(value, Collection) and not isinstance(value, str)
            names = is_collection and all(isinstance(each, str) for each in value)
            if not (names if expected is list else isinstance(value, expected)):
                words = {list: "a list of names", bool: "true or false", str: "a text"}[expected]
                raise MulkiError(f"{what}: {fact}: expected {words}, got {value!r}")
        if "paper" in facts:
            facts.setdefault("source", facts.pop("paper"))
        self.catalog.parts[kind, name] = Part(
            kind=kind, name=name, target=target, summary=summary, provenance=self.provenance,
            options={**documented, **(options or {})}, **facts,
        )  # fmt: skip

    def _add_file(self, kind: Files, path: Path) -> None:
        if path.suffix != ".yaml" or not path.is_file():
            raise MulkiError(f"register: there is no file {path}, expected one that ends in .yaml")
        files = self.catalog.files[kind]
        if path.stem in files:
            what = f"the {'recipe' if kind == 'recipes' else 'strategy'} {path.stem!r} of {self.provenance}"
            raise MulkiError(f"{what} is already there, from {files[path.stem][1]}")
        files[path.stem] = (path, self.provenance)
