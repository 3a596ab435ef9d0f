"""What a classifier says of its classes."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Protocol

from attrs import field, frozen


class HasPrompts(Protocol):
    """Anything with class names and prompt templates, such as a stream's Task."""

    @property
    def class_names(self) -> Sequence[str]: ...

    @property
    def templates(self) -> Sequence[str]: ...


def _texts(values: Sequence[str]) -> tuple[str, ...]:
    return (values,) if isinstance(values, str) else tuple(values)


def _names(values: Sequence[str]) -> tuple[str, ...]:
    if isinstance(values, str):
        raise ValueError(f"class_names: expected a list of texts, such as [{values!r}], got the text {values!r}")
    return tuple(values)


def _are_texts(_: object, attribute: object, value: Sequence[str]) -> None:
    name = getattr(attribute, "name", "prompts")
    if not value:
        raise ValueError(f"{name}: expected at least one, got none")
    if wrong := [text for text in value if not isinstance(text, str)]:
        raise ValueError(f"{name}: expected texts, got {wrong[0]!r}")


@frozen
class Prompts:
    """The class names of one task and the templates that make sentences of them, `{}` being the name's place."""

    class_names: tuple[str, ...] = field(converter=_names, validator=_are_texts)
    templates: tuple[str, ...] = field(default=("a photo of a {}.",), converter=_texts, validator=_are_texts)


def as_prompts(tasks: HasPrompts | Sequence[HasPrompts]) -> tuple[Prompts, ...]:
    """The prompts of each task; one task may stand without a list around it. ValueError for anything else."""
    several: tuple[Any, ...] = (tasks,) if hasattr(tasks, "class_names") else tuple(tasks)
    for task in several:
        if not hasattr(task, "class_names") or not hasattr(task, "templates"):
            raise ValueError(f"tasks: expected a stream's tasks or Prompts([names], [templates]), got {task!r}")
    return tuple(Prompts(task.class_names, task.templates) for task in several)


def sentences(prompts: HasPrompts, all_templates: bool) -> list[list[str]]:
    """One list for each template, first template first: `[templates][classes]`."""
    templates = prompts.templates if all_templates else prompts.templates[:1]
    return [[template.replace("{}", name) for name in prompts.class_names] for template in templates]


@frozen
class Union:
    """The classes of several tasks as one set."""

    places: list[list[int]]
    """For each task, the place of each of its classes in the union."""
    first: list[int]
    """For each place, which of the classes of all tasks, counted through, came to it first."""


def union_of(tasks: Sequence[Sequence[Hashable]]) -> Union:
    """The union of classes, each given as what describes it; a class described as one of an earlier task shares its place.

    Two classes of one task never share a place: they are told apart there, however they are described.
    """
    known: dict[Hashable, int] = {}
    places: list[list[int]] = []
    first: list[int] = []
    counted = 0
    for descriptions in tasks:
        row: list[int] = []
        for description in descriptions:
            place = known.get(description)
            if place is None or place in row:
                place = len(first)
                first.append(counted)
            row.append(place)
            counted += 1
        for description, place in zip(descriptions, row, strict=True):
            known.setdefault(description, place)
        places.append(row)
    return Union(places, first)
