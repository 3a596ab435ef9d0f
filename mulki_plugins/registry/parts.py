"""A part is anything that a recipe names: a plugin, a stream, a model, a metric or a logger."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from attrs import define, field, frozen

from mulki_plugins.errors import MulkiError, did_you_mean
from mulki_plugins.options import OptionError

Kind = Literal["plugin", "stream", "model", "metric", "logger"]
Target = str | Callable[..., Any]


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
        """The class or function itself. MulkiError where its package cannot be imported."""
        return self._loaded(self.target)

    def problems(self, options: Mapping[str, Any]) -> list[OptionError]:
        """What its own check says of these options, whose types are right. MulkiError where it cannot be imported."""
        return [] if self.check is None else list(self._loaded(self.check)(options))

    def _loaded(self, target: Target) -> Callable[..., Any]:
        if not isinstance(target, str):
            return target
        module, _, attribute = target.partition(":")
        try:
            found: Any = getattr(importlib.import_module(module), attribute)
        except Exception as error:
            raise MulkiError(
                f"the {self.kind} {self.name!r} of {self.provenance} cannot be loaded from {target}: "
                f"{type(error).__name__}: {error}"
            ) from error
        return found  # type: ignore[no-any-return]


@define
class Catalog:
    """Every part that is installed, the folders of YAML files, and what went wrong while they were gathered."""

    parts: dict[tuple[Kind, str], Part] = field(factory=dict)
    folders: dict[str, list[tuple[Path, Provenance]]] = field(factory=lambda: {"recipes": [], "strategies": []})
    problems: list[str] = field(factory=list)
    refused: dict[tuple[Kind, str], str] = field(factory=dict)
    """Names that somebody may look for, and why there is no such part."""

    def of_kind(self, kind: Kind) -> list[Part]:
        return sorted((part for part in self.parts.values() if part.kind == kind), key=lambda part: part.name)

    def find(self, kind: Kind, name: str) -> Part:
        """The part of that name; MulkiError with what may have been meant, or why there is none."""
        if part := self.parts.get((kind, name)):
            return part
        if reason := self.refused.get((kind, name)):
            raise MulkiError(f"the {kind} {name!r} cannot be used: {reason}")
        hint = did_you_mean(name, [part.name for part in self.of_kind(kind)])
        left_out = f"; {'; '.join(self.problems)}" if self.problems else ""
        raise MulkiError(f"no {kind} is named {name!r} ({hint}); `mulki list {kind}s` shows all{left_out}")


@frozen
class Register:
    """What a `mulki_register` hook is given: one method for each kind of part."""

    catalog: Catalog
    provenance: Provenance

    def plugin(
        self,
        name: str,
        target: Target,
        *,
        summary: str,
        source: str = "",
        defaults: Mapping[str, Any] | None = None,
        kinds: Mapping[str, Any] | None = None,
        requires: Sequence[str] = (),
        conflicts: Sequence[str] = (),
        after: Sequence[str] = (),
        keeps_images: bool = False,
        needs_reference: bool = False,
        adds_parameters: bool = False,
        sequential: bool = False,
        no_resume: str = "",
    ) -> None:
        """An Avalanche `SupervisedPlugin` class, or a function that returns one.

        defaults, kinds: values and types for the options of a class that was not written for MulKI.
        needs_reference: it takes a keyword argument `reference` (a `Reference`), which no recipe writes among the options.
        sequential: it does nothing, or fails, where all tasks are trained at once.
        no_resume: why a run with it cannot go on from a checkpoint, if it keeps what it has no `state_dict()` for.
        """
        self._add(
            Part(
                kind="plugin", name=name, target=target, summary=summary, source=source,
                provenance=self.provenance,
                defaults=dict(defaults or {}), kinds=dict(kinds or {}), requires=tuple(requires),
                conflicts=tuple(conflicts), after=tuple(after),
                keeps_images=keeps_images, needs_reference=needs_reference, adds_parameters=adds_parameters,
                sequential=sequential, no_resume=no_resume,
            )
        )  # fmt: skip

    def stream(
        self,
        name: str,
        target: Target,
        *,
        summary: str,
        source: str = "",
        tasks: Sequence[str] = (),
        extra: str = "",
        check: Target | None = None,
    ) -> None:
        """A function that takes options and returns a `TaskStream`.

        check: a function from the options to a list of `OptionError`, for mistakes that no type shows; it is called when a
        recipe is validated, so that its module imports no torch.
        """
        self._add(
            Part(
                kind="stream", name=name, target=target, summary=summary, source=source, provenance=self.provenance,
                tasks=tuple(tasks), extra=extra, check=check,
            )
        )  # fmt: skip

    def model(self, name: str, target: Target, *, summary: str, source: str = "") -> None:
        """A function that takes options and returns a `LoadedClip`."""
        self._add(
            Part(kind="model", name=name, target=target, summary=summary, source=source, provenance=self.provenance)
        )

    def metric(self, name: str, target: Target, *, summary: str, source: str = "", sequential: bool = True) -> None:
        """A function from the accuracy matrix [T, T] in percent to a number.

        sequential: it compares moments of the stream, so that it means nothing where all tasks are trained at once.
        """
        self._add(
            Part(
                kind="metric", name=name, target=target, summary=summary, source=source, provenance=self.provenance,
                sequential=sequential,
            )
        )  # fmt: skip

    def logger(self, name: str, target: Target, *, summary: str, source: str = "") -> None:
        """A function from a run's folder to an Avalanche `BaseLogger`."""
        self._add(
            Part(kind="logger", name=name, target=target, summary=summary, source=source, provenance=self.provenance)
        )

    def folder(self, kind: Literal["recipes", "strategies"], path: Path) -> None:
        """A folder whose `*.yaml` files are recipes or strategies, found by their file names."""
        self.catalog.folders[kind].append((path, self.provenance))

    def refuse(self, kind: Kind, name: str, reason: str) -> None:
        """Say why there is no part of that name, to those who look for it."""
        self.catalog.refused[kind, name] = reason

    def _add(self, part: Part) -> None:
        if other := self.catalog.parts.get((part.kind, part.name)):
            raise MulkiError(
                f"the {part.kind} {part.name!r} of {part.provenance} is already there, from {other.provenance}"
            )
        self.catalog.parts[part.kind, part.name] = part
