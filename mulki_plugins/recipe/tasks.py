"""The names of a stream's tasks as far as a recipe tells them: which are selected, held out of training, or shared."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from mulki_plugins.errors import Location, OptionError, did_you_mean, format_value
from mulki_plugins.recipe.layers import get
from mulki_plugins.recipe.parts import repeated
from mulki_plugins.registry.catalog import Part
from mulki_plugins.registry.discovery import catalog


def known_tasks(stream: Any) -> tuple[str, ...]:
    """The names of the tasks that a stream selects, in their order; empty if they are known only when it is built.

    stream: as in a recipe, a name or a mapping with options; anything in it may be wrong.
    """
    part = _part_of(stream)
    tasks, order, of = (get(stream, (key,)) for key in ("tasks", "order", "of"))
    if part is None:
        return ()
    if part.tasks:
        names = order if isinstance(order, list) else tasks if isinstance(tasks, list) else part.tasks
        return tuple(n for n in names if isinstance(n, str) and (not isinstance(tasks, list) or n in tasks))
    if isinstance(tasks, list):
        entries = [get(entry, ("name",)) for entry in tasks]
        return tuple(entry for entry in entries if isinstance(entry, str))
    if isinstance(of, list):
        parts = [known_tasks(each) for each in of]
        if not all(parts):
            return ()
        every = [task for tasks_of in parts for task in tasks_of]
        return tuple(n for n in order if n in every) if isinstance(order, list) else tuple(every)
    return ()


def may_share_images(one: Any, other: Any) -> bool:
    """Whether two streams, or streams inside them, are the same one and nothing shows that their tasks differ."""
    return any(a == b and not (x and y and x.isdisjoint(y)) for a, x in _sources(one) for b, y in _sources(other))


def _sources(stream: Any, left: Sequence[str] = ()) -> list[tuple[str, set[str]]]:
    """The streams inside `split` or `mixed`, or the stream itself: the name, and what tells its tasks apart, if anything does.

    left: the tasks that an outer stream leaves, if they are known.
    """
    name = stream if isinstance(stream, str) else get(stream, ("name",))
    of, tasks = (get(stream, (key,)) for key in ("of", "tasks"))
    if not isinstance(name, str):
        return []
    inside = [each for each in (of if isinstance(of, list) else [of]) if _part_of(each) is not None]
    if inside:
        return [source for each in inside for source in _sources(each, known_tasks(stream))]
    part = _part_of(stream)
    if part is not None and part.tasks:
        names = {task for task in known_tasks(stream) if not left or task in left}
        return [(name, names)] if names else []
    return [(name, {each for task in tasks for each in _folders_of(task)} if isinstance(tasks, list) else set())]


def _folders_of(task: Any) -> list[str]:
    """The folders of a task of `folders`, whatever its name is; of any other stream, the task as it is written."""
    paths = [get(task, (key,)) for key in ("train", "test", "images")]
    return [os.path.abspath(os.path.expanduser(path)) for path in paths if isinstance(path, str)] or [str(task)]


def _part_of(stream: Any) -> Part | None:
    name = stream if isinstance(stream, str) else get(stream, ("name",))
    return catalog().parts.get(("stream", str(name)))


def check_selection(stream: Any, path: Location) -> Iterator[OptionError]:
    """Mistakes in the options `order` and `tasks` of a stream with fixed tasks: unknown and repeated names, or none."""
    part = _part_of(stream)
    if part is None or not part.tasks:
        return
    order, tasks = (get(stream, (key,)) for key in ("order", "tasks"))
    for key, names in (("order", order), ("tasks", tasks)):
        if not isinstance(names, list):
            continue
        for i, name in repeated(enumerate(names)):
            yield OptionError(f"the task {name!r} is named twice", (*path, key, i))
        if not names:
            yield OptionError("expected at least one task, got an empty list", (*path, key))
        for i, name in enumerate(names):
            if isinstance(name, str) and name not in part.tasks:
                yield unknown_task(part.name, name, part.tasks, (*path, key, i))
    both = order and tasks and isinstance(order, list) and isinstance(tasks, list)
    if both and not any(task in order for task in tasks):
        yield OptionError("none of these tasks is in `order`, so none is left", (*path, "tasks"))


def unknown_task(stream: str, name: str, known: Sequence[str], path: Location) -> OptionError:
    return OptionError(f"the stream {stream} has no task {name!r} ({did_you_mean(name, known)})", path)


def check_held_out(data: dict[str, Any]) -> Iterator[OptionError]:
    """Held-out tasks that the stream does not have, that are repeated or have a budget, or that leave nothing to learn."""
    held_out = get(data, ("evaluate", "held_out"))
    if not isinstance(held_out, list):
        return
    path, known = ("evaluate", "held_out"), known_tasks(data.get("stream"))
    names = [(i, name) for i, name in enumerate(held_out) if isinstance(name, str)]
    for i, name in repeated(names):
        yield OptionError(f"the task {format_value(name)} is held out twice", (*path, i))
    for i, name in names:
        if known and name not in known:
            hint = (
                f"{did_you_mean(name, known)}; a held-out task must be one of the stream's; it is tested, never trained"
            )
            yield OptionError(f"the stream has no task {format_value(name)} ({hint})", (*path, i))
    if known and set(known) <= {name for _, name in names}:
        yield OptionError("every task of the stream is held out, so none is left to learn", path)
    budgets = get(data, ("train", "per_task"))
    for _, name in names if isinstance(budgets, dict) else ():
        if name in budgets:
            message = f"the task {format_value(name)} is held out (evaluate.held_out), so it is never trained"
            yield OptionError(message, ("train", "per_task", name))
