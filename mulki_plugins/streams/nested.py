"""A stream in the options of another one, `split` or `mixed`: a name, or a mapping of a name and options, as in a recipe.

Imports neither torch nor numpy, so that `mulki validate` checks the options of both.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from mulki_plugins.errors import Location, Mistakes, MulkiError, OptionError, did_you_mean, format_value
from mulki_plugins.recipe.parts import check_part
from mulki_plugins.recipe.tasks import check_selection, known_tasks
from mulki_plugins.recipe.yaml import format_path
from mulki_plugins.registry.discovery import catalog
from mulki_plugins.registry.guard import guarded_call

if TYPE_CHECKING:
    from mulki_plugins.streams.task import TaskStream

IN_SPLIT, IN_MIXED = ("split", "mixed"), ("mixed",)
"""The streams that must not stand inside `split` and inside `mixed`."""
_LARGEST_SEED = 2**32 - 1


def read_nested(
    value: Any, path: Location, *, refused: Collection[str] = ()
) -> tuple[dict[str, Any], list[OptionError]]:
    """The stream with all options filled in, and everything that is wrong with it; paths start with `path`.

    refused: streams that must not stand here.
    """
    stream = {"name": value} if isinstance(value, str) else value
    if not isinstance(stream, dict) or not isinstance(stream.get("name"), str):
        message = f"expected a stream, as a name or as {{name: ..., option: ...}}, got {format_value(value)}"
        return {}, [OptionError(message, path)]
    if stream["name"] in refused:
        return {}, [OptionError(f"the stream {stream['name']!r} cannot stand inside this one", (*path, "name"))]
    if wrong := list(check_selection(stream, path)):
        return stream, wrong
    return check_part("stream", stream, path)


def innermost(stream: dict[str, Any]) -> list[dict[str, Any]]:
    """The streams inside a valid `split` or `mixed`, with all their options, or the stream itself."""
    if stream["name"] not in IN_SPLIT:
        return [stream]
    of = stream["of"] if stream["name"] == "mixed" else [stream["of"]]
    return [each for value in of for each in innermost(read_nested(value, ())[0])]


def build_nested(value: Any, path: Location, *, refused: Collection[str] = ()) -> TaskStream:
    """The stream itself. Mistakes if its options are wrong, MulkiError if its data are missing."""
    from mulki_plugins.streams.task import TaskStream

    stream, mistakes = read_nested(value, path, refused=refused)
    if mistakes:
        raise Mistakes([f"stream.{format_path(mistake.path)[2:]}: {mistake.message}" for mistake in mistakes])
    part = catalog().find("stream", stream.pop("name"))
    options = copy.deepcopy(stream)
    make, what = part.load(), f"the {part} cannot be made"
    built: Any = make(**options) if part.is_ours else guarded_call(what, make, **options)
    if not isinstance(built, TaskStream):
        raise MulkiError(f"the {part} cannot be used: returned a {type(built).__name__}, expected a TaskStream")
    return built


def check_split(options: Mapping[str, Any]) -> list[OptionError]:
    """Mistakes in the stream whose classes are split, and in their order."""
    of, order = options.get("of"), options.get("class_order")
    mistakes = read_nested(of, ("of",), refused=IN_SPLIT)[1]
    if len(tasks := known_tasks(of)) > 1 and not mistakes:
        message = f"expected a stream of one task, got {len(tasks)}; name one with `tasks: [{tasks[0]}]`"
        mistakes.append(OptionError(message, ("of",)))
    if isinstance(order, int) and order > _LARGEST_SEED:
        mistakes.append(OptionError(f"expected a seed of at most {_LARGEST_SEED}, got {order}", ("class_order",)))
    names = order if isinstance(order, list) else []
    for i, name in enumerate(names):
        if name in names[:i]:
            mistakes.append(OptionError(f"the class {format_value(name)} is named twice", ("class_order", i)))
    return mistakes


def check_mixed(options: Mapping[str, Any]) -> list[OptionError]:
    """Mistakes in the streams that are mixed, and in an `order` of names."""
    of, order = options.get("of"), options.get("order")
    if not isinstance(of, list) or not of:
        return [OptionError("expected a list of at least one stream", ("of",))]
    mistakes = [error for i, each in enumerate(of) for error in read_nested(each, ("of", i), refused=IN_MIXED)[1]]
    if not isinstance(order, list):
        return mistakes
    if not order:
        mistakes.append(OptionError("expected at least one task, got an empty list", ("order",)))
    parts = [known_tasks(each) for each in of]
    known = {task for tasks in parts for task in tasks}
    for i, name in enumerate(order):
        if name in order[:i]:
            mistakes.append(OptionError(f"the task {format_value(name)} is named twice", ("order", i)))
        elif all(parts) and name not in known:
            hint = did_you_mean(name, known)
            mistakes.append(OptionError(f"no stream has the task {format_value(name)} ({hint})", ("order", i)))
    return mistakes
