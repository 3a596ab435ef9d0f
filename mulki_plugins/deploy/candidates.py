"""The classes among which an image is classified: those learned, all, those of a task, or any names."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import evolve, field, frozen

from mulki_plugins.deploy.source import Source
from mulki_plugins.errors import MulkiError, did_you_mean, format_value
from mulki_plugins.models.text import HasPrompts, Prompts, check_sentences, reader_of, union_of
from mulki_plugins.report.classes import TaskTexts
from mulki_plugins.streams.names import class_key, is_template

if TYPE_CHECKING:
    from torch import Tensor

    from mulki_plugins.deploy.features import TextFeatures
    from mulki_plugins.deploy.model import DeployedClip
    from mulki_plugins.models.routes import Route

TEMPLATE = "a photo of a {}."
"""The template of class names that belong to no task."""


@frozen(eq=False)
class Candidates:
    """Classes to choose from; classes of several tasks that the model cannot tell apart are one."""

    names: tuple[str, ...]
    tasks: tuple[str | None, ...]
    """The first task of each class; None for names that belong to none."""
    features: Tensor
    """[C, d], unit norm."""
    places: dict[int, list[int]]
    """For each task in the scope, by index, the candidate that each of its classes is; -1 for a task that the run lacks."""
    prompts: tuple[HasPrompts, ...] = ()
    """What the features were computed from: of each class of these tasks one after the other."""
    first: tuple[int, ...] = ()
    """For each candidate its place among these."""
    _by_route: dict[Route, Tensor] = field(factory=dict)

    def of_route(self, model: DeployedClip) -> Tensor:
        """The features [C, d] by the route that the model's towers take now; kept."""
        assert model.routes is not None
        route = model.routes.current
        if route is None:
            return self.features
        if route not in self._by_route:
            import torch

            texts = [model.encode_classes(each.class_names, each.templates) for each in self.prompts]
            self._by_route[route] = torch.cat(texts)[list(self.first)]
        return self._by_route[route]

    def named(self, name: str) -> list[int]:
        """The candidates with this name, in whatever case."""
        key = class_key(name)
        return [i for i, other in enumerate(self.names) if class_key(other) == key]


def tasks_in(source: Source, classes: str) -> list[int] | None:
    """The tasks that `--classes` names, by index; None if it lists other names. MulkiError if it can only be a mistake."""
    every = [task.name for task in source.tasks]
    if classes == "all":
        return list(range(len(every)))
    if classes == "seen":
        return sorted(source.learned)
    if classes in every:
        return [every.index(classes)]
    parts = _list_names(classes)
    if classes.startswith("@"):
        if len(parts) < 2:
            found = "one name" if parts else "no name"
            raise MulkiError(f"--classes: {classes[1:]}: {found} in this file", "write at least two, one a line")
        return None
    if parts and all(part in every for part in parts):
        return [every.index(part) for part in dict.fromkeys(parts)]
    if len(parts) < 2:
        hint = f"{did_you_mean(classes, ['seen', 'all', *every])}; to choose among other classes, list them: cat,dog"
        raise MulkiError(f"--classes: no task is named {format_value(classes)}", hint)
    if tasks := [part for part in parts if part in every]:
        other = next(part for part in parts if part not in every)
        what = f"--classes: {format_value(tasks[0])} is a task, and no task is named {format_value(other)}"
        hint = f"{did_you_mean(other, every)}; to choose among these words as class names, write them in a file: @names.txt"
        raise MulkiError(what, hint)
    return None


def _list_names(classes: str) -> list[str]:
    """Class names in a list with commas, or in the lines of a file, `@names.txt`; each name once."""
    if classes.startswith("@"):
        try:
            lines = Path(os.path.expanduser(classes[1:])).read_text("utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise MulkiError(f"--classes: {classes[1:]}: cannot be read as a text file: {error}") from error
    else:
        lines = classes.split(",")
    unique: dict[str, str] = {}
    for line in lines:
        if line.strip():
            unique.setdefault(class_key(line), line.strip())
    return list(unique.values())


def check_templates(templates: Sequence[str]) -> None:
    """MulkiError for a template without a place for the class name."""
    for template in templates:
        if not is_template(template):
            hint = "write {} in the class name's place, as in 'a photo of a {}.'"
            raise MulkiError(f"--template: {format_value(template)} has no {{}}, or other braces", hint)


def check_texts(source: Source, model: DeployedClip, classes: str, templates: Sequence[str] = ()) -> list[str]:
    """Warnings about names and templates of the command line that the model cuts off. Mistakes if it reads two classes
    as the same text."""
    indices = tasks_in(source, classes)
    if indices is None:
        names = tuple(_list_names(classes))
        own = TaskTexts(name="", class_names=names, templates=tuple(templates) or (TEMPLATE,))
        texts, called = [own], "--classes"
    elif templates:
        texts, called = [evolve(source.tasks[i], templates=tuple(templates)) for i in indices], "task {}"
    else:
        return []
    return check_sentences(texts, reader_of(model.tokenizer), called=called)


def choose_candidates(source: Source, model: DeployedClip, classes: str, templates: Sequence[str] = ()) -> Candidates:
    """The candidates that `--classes` names. templates: replace those of the tasks."""
    from mulki_plugins.deploy.features import compute_features, text_features

    check_templates(templates)
    indices = tasks_in(source, classes)
    if indices is None:
        names = tuple(_list_names(classes))
        each = Prompts(names, tuple(templates) or (TEMPLATE,))
        features = compute_features(model, each)
        return Candidates(names, (None,) * len(names), features.text, {}, (each,), tuple(range(len(names))))
    if templates:
        prompts = {i: Prompts(source.tasks[i].class_names, tuple(templates)) for i in indices}
        return unite(source, {i: compute_features(model, each) for i, each in prompts.items()}, prompts)
    return unite(source, text_features(source, model, indices))


def unite(
    source: Source, features: dict[int, TextFeatures], prompts: Mapping[int, HasPrompts] | None = None
) -> Candidates:
    """The classes of several tasks of a source as candidates. prompts: what their features were computed from; by default
    the source's own."""
    import torch

    texts: Sequence[HasPrompts] | Mapping[int, HasPrompts] = source.tasks if prompts is None else prompts
    union = union_of([each.keys for each in features.values()])
    pairs = [(name, source.tasks[i].name) for i in features for name in source.tasks[i].class_names]
    return Candidates(
        names=tuple(pairs[first][0] for first in union.first),
        tasks=tuple(pairs[first][1] for first in union.first),
        features=torch.cat([each.text for each in features.values()])[union.first],
        places=dict(zip(features, union.places, strict=True)),
        prompts=tuple(texts[i] for i in features),
        first=tuple(union.first),
    )
