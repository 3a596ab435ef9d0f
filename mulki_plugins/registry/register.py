"""How a package registers its parts and YAML files: the argument of the hook `mulki_register`."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from attrs import frozen

from mulki_plugins.errors import MulkiError
from mulki_plugins.registry.catalog import Catalog, Files, Kind, Part, Provenance
from mulki_plugins.registry.static import Target, read_attributes, read_docstring

if TYPE_CHECKING:
    from importlib.abc import Traversable

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_TARGET = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
_FACTS: dict[str, type] = {
    "requires": list, "conflicts": list, "after": list, "keeps_images": bool, "needs_reference": bool,
    "adds_parameters": bool, "sequential": bool, "per_sample": bool, "no_resume": str, "one_process": str, "paper": str,
}  # fmt: skip
"""The facts of a plugin that its class states as class attributes, with their types."""
_OF_ARGUMENTS: dict[str, type] = {"tasks": list, "options": Mapping, "defaults": Mapping, "kinds": Mapping}
"""What only arguments state."""
_WORDS = {
    list: "a list of names", Mapping: "a mapping with names of options as keys", bool: "true or false", str: "a text",
}  # fmt: skip


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
        per_sample: bool | None = None, no_resume: str | None = None, one_process: str | None = None,
        check: Target | None = None,
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
        one_process: why a run with it cannot be spread over several ranks, if it cannot, see docs/distributed.md.
        check: a function from the options to a list of `OptionError`, as for a stream; its module must not import torch.
        """
        self._add(
            "plugin", name, target, summary, options, defaults=defaults, kinds=kinds, source=source,
            requires=requires, conflicts=conflicts, after=after, keeps_images=keeps_images, needs_reference=needs_reference,
            adds_parameters=adds_parameters, sequential=sequential, per_sample=per_sample, no_resume=no_resume,
            one_process=one_process, check=check,
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

    def head(
        self, name: str, target: Target, *, summary: str | None = None, source: str | None = None,
        options: Mapping[str, str] | None = None, check: Target | None = None,
    ) -> None:  # fmt: skip
        """A subclass of `mulki_plugins.heads.Head`, or a function that returns one: it turns image features into logits.

        check: a function from the options to a list of `OptionError`, as for a stream; its module must not import torch.
        """
        self._add("head", name, target, summary, options, source=source, check=check)

    def optimizer(
        self, name: str, target: Target, *, summary: str | None = None, source: str | None = None,
        options: Mapping[str, str] | None = None, defaults: Mapping[str, Any] | None = None,
        kinds: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """A class or function from parameter groups and options to a `torch.optim.Optimizer`.

        The first argument is the list of parameter groups; `lr`, and if it has them `weight_decay` and `fused` (a GPU's one
        kernel for all weights), come from the recipe and the device; `name_of`, if it has it, is a function from a weight to
        its name. The other keyword arguments are its options. A new one is made for each task.
        defaults, kinds: values and types for the options of a class that was not written for MulKI.
        """
        self._add(
            "optimizer", name, target, summary, options, source=source, defaults=defaults, kinds=kinds
        )  # fmt: skip

    def metric(
        self, name: str, target: Target, *, summary: str | None = None, source: str = "", sequential: bool = True,
        counts_images: bool = False, classes: str = "",
    ) -> None:  # fmt: skip
        """A function from a copy of the accuracy matrix [T, T], in percent, to a finite number; if it fails, the run goes on.

        sequential: it compares moments of the stream, so it means nothing if all tasks are trained at once.
        counts_images: its second argument is the number of test images of each task, a list of T numbers.
        classes: the value of a recipe's `evaluate.classes` that it is defined for, such as `seen`; empty for any.
        """
        facts = {"sequential": sequential, "counts_images": counts_images, "classes": classes}
        self._add("metric", name, target, summary, source=source, **facts)

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

    def study(self, path: Path | str | Traversable) -> None:
        """A YAML file with a study, which is named after the file, without `.yaml`."""
        self._add_file("studies", Path(str(path)))

    def folder(self, kind: Files, path: Path | str | Traversable) -> None:
        """A folder of `*.yaml` files that are all recipes, all strategies, or all studies.

        `register.folder("strategies", importlib.resources.files("my_package") / "strategies")`.
        """
        if kind not in get_args(Files):
            raise MulkiError(f"register.folder: expected 'recipes', 'strategies' or 'studies', got {kind!r}")
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
                attributes = read_attributes(target, _FACTS) if kind in ("plugin", "adapter", "head") else {}
        summary = line if summary is None else summary
        if not isinstance(summary, str) or not summary.strip() or "\n" in summary.strip():
            raise MulkiError(f"{what}: expected a summary of one line, or a docstring")
        given = {"options": options, **facts}
        facts = {**attributes, **{fact: value for fact, value in given.items() if value is not None}}
        for fact, value in facts.items():
            expected = _OF_ARGUMENTS.get(fact) or _FACTS.get(fact, object)
            is_collection = isinstance(value, Collection) and not isinstance(value, str)
            names = is_collection and all(isinstance(each, str) for each in value)
            wrong_type = expected is not list and not isinstance(value, expected)
            if wrong_type or (expected in (list, Mapping) and not names):
                raise MulkiError(f"{what}: {fact}: expected {_WORDS[expected]}, got {value!r}")
        if "paper" in facts:
            facts.setdefault("source", facts.pop("paper"))
        self.catalog.parts[kind, name] = Part(
            kind=kind, name=name, target=target, summary=summary, provenance=self.provenance,
            options={**documented, **facts.pop("options", {})}, **facts,
        )  # fmt: skip

    def _add_file(self, kind: Files, path: Path) -> None:
        if path.suffix != ".yaml" or not path.is_file():
            raise MulkiError(f"register: there is no file {path}, expected one that ends in .yaml")
        files = self.catalog.files[kind]
        if path.stem in files:
            singular = {"recipes": "recipe", "strategies": "strategy", "studies": "study"}[kind]
            what = f"the {singular} {path.stem!r} of {self.provenance}"
            raise MulkiError(f"{what} is already there, from {files[path.stem][1]}")
        files[path.stem] = (path, self.provenance)
