"""The stream `mixed`: the tasks of several streams in one."""

from __future__ import annotations

from itertools import zip_longest
from typing import Any, Literal

from mulki_plugins.errors import MulkiError, did_you_mean, format_value
from mulki_plugins.streams.names import task_key
from mulki_plugins.streams.nested import IN_MIXED, build_nested
from mulki_plugins.streams.selection import with_validation
from mulki_plugins.streams.task import Task, TaskStream


def mixed(
    *,
    of: list[Any],
    order: Literal["sequence", "alternate"] | list[str] = "sequence",
    evaluate_on: Literal["test", "validation"] = "test",
) -> TaskStream:
    """The tasks of several streams in one stream, such as photographs in folders between the drawings of mtil-mini.

    MulkiError if two tasks have the same name, if `order` names a task that no stream has, or if no class of a task has
    five training images for a validation.

    Args:
        of: The streams, each a name or {name, options}.
        order: One stream after the other (`sequence`), a task of each in turn (`alternate`), or a list of task names, which
            leaves out the others.
        evaluate_on: The `test` images, or `validation`: a fifth of each class's training images, held out of training.
    """
    streams = [build_nested(each, ("of", i), refused=IN_MIXED) for i, each in enumerate(of)]
    by_name = {task.name: task for stream in streams for task in stream.tasks}
    _refuse_same_names([(stream.name, task.name) for stream in streams for task in stream.tasks])
    tasks: tuple[Task, ...]
    if isinstance(order, list):
        for name in order:
            if name not in by_name:
                raise MulkiError(f"mixed: no stream has the task {format_value(name)} ({did_you_mean(name, by_name)})")
        tasks = tuple(by_name[name] for name in dict.fromkeys(order))
    elif order == "alternate":
        rounds = zip_longest(*(stream.tasks for stream in streams))
        tasks = tuple(task for each in rounds for task in each if task is not None)
    else:
        tasks = tuple(task for stream in streams for task in stream.tasks)
    if evaluate_on == "validation":
        tasks = tuple(with_validation(task) for task in tasks)
    return TaskStream(
        name="mixed",
        tasks=tasks,
        notices=tuple(dict.fromkeys(notice for stream in streams for notice in stream.notices)),
        incomparable=tuple(dict.fromkeys(reason for stream in streams for reason in stream.incomparable)),
    )


def _refuse_same_names(tasks: list[tuple[str, str]]) -> None:
    """MulkiError if two tasks, given as (stream, task), have the same name: accuracies are stored by it."""
    seen: dict[str, str] = {}
    for stream, name in tasks:
        if (other := seen.setdefault(task_key(name), stream)) != stream or tasks.count((stream, name)) > 1:
            both = stream if other == stream else f"{other} and {stream}"
            raise MulkiError(
                f"mixed: the task {format_value(name)} is in {both}",
                "leave it out of one with `tasks`, or give folders another name",
            )
