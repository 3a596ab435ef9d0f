"""The names of a stream's tasks as far as a recipe tells them: which are selected, and which are held out of training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from mulki_plugins.errors import Location, OptionError, did_you_mean, format_value
from mulki_plugins.recipe.layers import get
from mulki_plugins.recipe.parts import repeated
from mulki_plugins.registry.discovery import catalog


def known_tasks(stream: Any) -> tuple[str, ...]:
    """The names of the tasks that a stream selects, in their order; empty if they are known only when it is built.

    stream: as in a recipe, a name or a mapping with options; anything in it may be wrong.
    """
    name = stream if isinstance(stream, str) else get(stream, ("name",))
    part = catalog().parts.get(("stream", str(name)))
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


def check_selection(stream: Any, path: Location) -> Iterator[OptionError]:
    """Mistakes in the options `order` and `tasks` of a stream with fixed tasks: unknown and repeated names, or none."""
    part = catalog().parts.get(("stream", str(get(stream, ("name",)))))
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
        yield OptionError("none of these tasks is in stream.order, so none is left", (*path, "tasks"))


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
