"""How a package says what it brings: what its hook `mulki_register` is given."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from attrs import evolve, frozen

from mulki_plugins.errors import MulkiError
from mulki_plugins.registry.parts import Catalog, Files, Kind, Part, Provenance, Target

if TYPE_CHECKING:
    from importlib.abc import Traversable

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_TARGET = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


@frozen
class Register:
    """What a `mulki_register` hook is given: one method for each kind of part.

    Every part has a name, of letters, digits, `.`, `_` and `-`, that no other of its kind has, and a summary of one line.
    target: a text `package.module:attribute`, which is imported when the part is used, or the object itself. source: the
    paper or page that it follows. options: a line on each of its options, for editors and the reference.
    """

    catalog: Catalog
    provenance: Provenance

    def plugin(
        self,
        name: str,
        target: Target,
        *,
        summary: str,
        source: str = "",
        options: Mapping[str, str] | None = None,
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
        requires: plugins without which it does not work, and which must stand before it in a stack. conflicts: plugins
        with which it does not work. after: plugins that must stand before it where they are in the stack.
        keeps_images: it keeps images of past tasks.
        needs_reference: it takes a keyword argument `reference` (a `Reference`), which no recipe writes among the options.
        adds_parameters: it adds weights to the model.
        sequential: it does nothing, or fails, where all tasks are trained at once.
        no_resume: why a run with it cannot go on from a checkpoint, if it keeps what it has no `state_dict()` for.
        """
        self._add(
            Part(
                kind="plugin", name=name, target=target, summary=summary, source=source,
                provenance=self.provenance, options=dict(options or {}),
                defaults=dict(defaults or {}), kinds=dict(kinds or {}), requires=_names(requires, "requires"),
                conflicts=_names(conflicts, "conflicts"), after=_names(after, "after"),
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
        options: Mapping[str, str] | None = None,
        tasks: Sequence[str] = (),
        extra: str = "",
        check: Target | None = None,
    ) -> None:
        """A function that takes options and returns a `TaskStream`.

        tasks: the names of its tasks where they are fixed, so that a recipe's `per_task` is checked before it is built.
        extra: the optional dependencies that it needs, as in `mulki[mini]`.
        check: a function from the options to a list of `OptionError`, for mistakes that no type shows; it is called when a
        recipe is validated, so that its module imports no torch.
        """
        self._add(
            Part(
                kind="stream", name=name, target=target, summary=summary, source=source, provenance=self.provenance,
                options=dict(options or {}), tasks=_names(tasks, "tasks"), extra=extra, check=check,
            )
        )  # fmt: skip

    def model(
        self,
        name: str,
        target: Target,
        *,
        summary: str,
        source: str = "",
        options: Mapping[str, str] | None = None,
        check: Target | None = None,
    ) -> None:
        """A function that takes options and returns a `LoadedClip`.

        check: as for a stream, a function from the options to a list of `OptionError`; its module imports no torch.
        """
        self._add(
            Part(
                kind="model", name=name, target=target, summary=summary, source=source, provenance=self.provenance,
                options=dict(options or {}), check=check,
            )
        )  # fmt: skip

    def metric(self, name: str, target: Target, *, summary: str, source: str = "", sequential: bool = True) -> None:
        """A function from a copy of the accuracy matrix [T, T] in percent to a finite number; one that fails costs its value.

        sequential: it compares moments of the stream, so that it means nothing where all tasks are trained at once.
        """
        self._add(
            Part(
                kind="metric", name=name, target=target, summary=summary, source=source, provenance=self.provenance,
                sequential=sequential,
            )
        )  # fmt: skip

    def logger(self, name: str, target: Target, *, summary: str, source: str = "") -> None:
        """A function from a run's folder to an Avalanche `BaseLogger`; one that fails is dropped, and the run goes on."""
        self._add(
            Part(kind="logger", name=name, target=target, summary=summary, source=source, provenance=self.provenance)
        )

    def command(self, name: str, target: Target, *, summary: str) -> None:
        """A `click.Command`, called as `mulki NAME`. summary: its line in `mulki --help`, for which it is not imported."""
        self._add(Part(kind="command", name=name, target=target, summary=summary, provenance=self.provenance))

    def recipe(self, path: Path | str | Traversable) -> None:
        """One YAML file, a recipe under the file's name without `.yaml`."""
        self._file("recipes", Path(str(path)))

    def strategy(self, path: Path | str | Traversable) -> None:
        """One YAML file, a strategy under the file's name without `.yaml`."""
        self._file("strategies", Path(str(path)))

    def folder(self, kind: Files, path: Path | str | Traversable) -> None:
        """A folder whose `*.yaml` files are all recipes, or all strategies, as by `recipe` and `strategy`.

        `register.folder("strategies", importlib.resources.files("my_package") / "strategies")`.
        """
        if kind not in get_args(Files):
            raise MulkiError(f"register.folder: expected 'recipes' or 'strategies', got {kind!r}")
        folder = Path(str(path))
        if not folder.is_dir():
            raise MulkiError(f"register.folder: there is no folder {folder}")
        for file in sorted(folder.glob("*.yaml")):
            self._file(kind, file)

    def refuse(self, kind: Kind, name: str, reason: str) -> None:
        """Say why there is no part of that name, to those who look for it."""
        self.catalog.refused[kind, name] = reason

    def describe(self, kind: Kind, name: str, **options: str) -> None:
        """Add to the lines on the options of a part that this package has registered."""
        part = self.catalog.parts.get((kind, name))
        if part is None or part.provenance != self.provenance:
            raise MulkiError(f"register.describe: {self.provenance} has registered no {kind} {name!r}")
        self.catalog.parts[kind, name] = evolve(part, options={**part.options, **options})

    def _file(self, kind: Files, path: Path) -> None:
        if path.suffix != ".yaml" or not path.is_file():
            raise MulkiError(f"register: there is no file {path}, expected one that ends in .yaml")
        there = self.catalog.files[kind]
        if path.stem in there:
            singular = {"recipes": "recipe", "strategies": "strategy"}[kind]
            other = there[path.stem][1]
            raise MulkiError(f"the {singular} {path.stem!r} of {self.provenance} is already there, from {other}")
        there[path.stem] = (path, self.provenance)

    def _add(self, part: Part) -> None:
        _check(part)
        if other := self.catalog.parts.get((part.kind, part.name)):
            raise MulkiError(
                f"the {part.kind} {part.name!r} of {part.provenance} is already there, from {other.provenance}"
            )
        self.catalog.parts[part.kind, part.name] = part


def _names(value: Sequence[str], what: str) -> tuple[str, ...]:
    if isinstance(value, str) or not all(isinstance(name, str) for name in value):
        raise MulkiError(f"register: {what}: expected a list of names, got {value!r}")
    return tuple(value)


def _check(part: Part) -> None:
    """MulkiError where a part cannot be used under its name, or has nothing to be listed with."""
    if not isinstance(part.name, str) or not _NAME.fullmatch(part.name):
        what = "expected letters, digits, '.', '_' and '-', the first a letter or digit"
        raise MulkiError(f"the {part.kind} {part.name!r} of {part.provenance}: {what}")
    if not isinstance(part.summary, str) or not part.summary.strip() or "\n" in part.summary.strip():
        raise MulkiError(f"the {part.kind} {part.name!r} of {part.provenance}: expected a summary of one line")
    text = isinstance(part.target, str)
    if not (_TARGET.fullmatch(part.target) if isinstance(part.target, str) else callable(part.target)):
        what = f"{part.target!r}" if text else f"a {type(part.target).__name__}"
        raise MulkiError(
            f"the {part.kind} {part.name!r} of {part.provenance}: expected a target `package.module:attribute`, got {what}"
        )
