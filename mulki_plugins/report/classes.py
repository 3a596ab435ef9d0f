"""classes.json: the class names and templates of a run's tasks, so that its model can be used without its data."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from attrs import frozen

from mulki_plugins.errors import MulkiError
from mulki_plugins.files import write_text

FILE = "classes.json"
"""In the folder of a run, and in a model that was exported from it."""


class HasTexts(Protocol):
    """A task with a name, class names and templates, such as a stream's Task."""

    @property
    def name(self) -> str: ...

    @property
    def class_names(self) -> Sequence[str]: ...

    @property
    def templates(self) -> Sequence[str]: ...


@frozen(kw_only=True)
class TaskTexts:
    """What a model reads of a task, and the licence of its data, empty if it was not declared."""

    name: str
    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    licence: str = ""


@frozen(kw_only=True)
class Classes:
    """The texts of all tasks, and the indices of the tasks learned; None in the folder of a run, whose matrix says it."""

    tasks: tuple[TaskTexts, ...]
    learned: tuple[int, ...] | None = None


def write_classes(folder: Path, tasks: Iterable[HasTexts], learned: Sequence[int] | None = None) -> None:
    """Write classes.json. Nothing in it depends on a locale, and all of it is ASCII."""
    entries = [
        {
            "name": task.name, "class_names": list(task.class_names), "templates": list(task.templates),
            "licence": str(getattr(task, "licence", "")),
        }
        for task in tasks
    ]  # fmt: skip
    data = {"tasks": entries} if learned is None else {"tasks": entries, "learned": list(learned)}
    write_text(folder / FILE, json.dumps(data, indent=1) + "\n")


def read_classes(folder: Path) -> Classes:
    """Read classes.json. MulkiError if it does not hold what `write_classes` writes."""
    path = folder / FILE
    try:
        data: Any = json.loads(path.read_text("utf-8"))
        tasks = tuple(
            TaskTexts(
                name=_text(task["name"]),
                class_names=_texts(task["class_names"]),
                templates=_texts(task["templates"]),
                licence=_text(task.get("licence", "")),
            )
            for task in data["tasks"]
        )
        learned = data.get("learned")
        if not tasks or not (learned is None or all(type(i) is int and 0 <= i < len(tasks) for i in learned)):
            raise ValueError("expected at least one task, and indices of tasks in `learned`")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise MulkiError(f"{path}: does not hold the class names of a run: {error}") from error
    return Classes(tasks=tasks, learned=None if learned is None else tuple(learned))


def _texts(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list) or not values:
        raise ValueError("expected a list of texts")
    return tuple(map(_text, values))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected a text, got {value!r}")
    return value
