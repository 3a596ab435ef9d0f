"""Names of tasks, classes and templates: which are allowed, which are the same, and which tasks of a stream are meant."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from mulki_plugins.characters import printable
from mulki_plugins.errors import MulkiError, did_you_mean
from mulki_plugins.recipe.check import is_template as is_template  # streams name it from here

LONGEST = 200
"""Characters in a task's name."""


def is_task_name(name: str) -> bool:
    """Whether a text can name a task: it appears in tables, tags of curves and file names."""
    tidy = bool(name.strip()) and name == name.strip() and printable(name) == name and len(name) <= LONGEST
    return tidy and name not in (".", "..") and not any(c in name for c in "/\\")


def task_key(name: str) -> str:
    """Equal for names of the same task."""
    return " ".join(unicodedata.normalize("NFC", name).split())


def class_key(name: str) -> str:
    """Equal for class names that a CLIP reads alike: its tokenizer ignores case and joins spaces; `_` counts as a space."""
    return " ".join(unicodedata.normalize("NFC", name).casefold().replace("_", " ").split())


def group_same_names(folders: Sequence[str], names: Iterable[str]) -> list[tuple[str, list[str]]]:
    """Each class name that several folders share, with those folders."""
    groups: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for folder, name in zip(folders, names, strict=True):
        groups[class_key(name)].append((folder, name))
    return [(group[0][1], [folder for folder, _ in group]) for group in groups.values() if len(group) > 1]


def select_tasks(
    stream: str, orders: Mapping[str, Sequence[str]], order: str | list[str] | None, tasks: list[str] | None
) -> list[str]:
    """The names of a stream's selected tasks in their order. MulkiError for an unknown or repeated name, or an empty result.

    orders: named orders, `I` with all tasks. order: one of these names, or task names; by default the order of `tasks`,
    or I. tasks: the selection.
    """
    if order is None:
        order = "I" if tasks is None else tasks
    names = list(orders[order] if isinstance(order, str) else order)
    for name in [*names, *(tasks or [])]:
        if name not in orders["I"]:
            raise MulkiError(f"{stream} has no task {name!r} ({did_you_mean(name, orders['I'])})")
    if len(set(names)) < len(names):
        raise MulkiError(f"{stream}: the order names a task twice")
    selected = [name for name in names if tasks is None or name in tasks]
    if not selected:
        raise MulkiError(f"{stream}: no task is left")
    return selected


def order_notices(names: Sequence[str], tasks: Sequence[str] | None) -> tuple[str, ...]:
    """A notice if `order` rearranges the selected tasks."""
    if tasks is None or list(names) == [task for task in tasks if task in names]:
        return ()
    return (f"the tasks come in the sequence of stream.order: {', '.join(names)}; without it they come as written",)
