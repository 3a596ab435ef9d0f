"""Which tasks of a stream whose tasks are fixed, and in which order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mulki_plugins.errors import MulkiError, did_you_mean


def chosen(
    stream: str, orders: Mapping[str, Sequence[str]], order: str | list[str] | None, tasks: list[str] | None
) -> list[str]:
    """The names of the tasks in their order. MulkiError where one is unknown, stands twice, or none is left.

    orders: the stream's own, by name, of which `I` has all tasks. order: one of them, or names; without it the tasks come
    as they are written, or all in order I. tasks: only these.
    """
    if order is None:
        order = "I" if tasks is None else tasks
    names = list(orders[order] if isinstance(order, str) else order)
    for name in [*names, *(tasks or [])]:
        if name not in orders["I"]:
            raise MulkiError(f"{stream} has no task {name!r} ({did_you_mean(name, orders['I'])})")
    if len(set(names)) < len(names):
        raise MulkiError(f"{stream}: a task stands in the order twice")
    left = [name for name in names if tasks is None or name in tasks]
    if not left:
        raise MulkiError(f"{stream}: no task is left")
    return left


def reordered(names: Sequence[str], tasks: Sequence[str] | None) -> tuple[str, ...]:
    """What to tell the user where `order` brings the tasks into another sequence than they are written in."""
    if tasks is None or list(names) == [task for task in tasks if task in names]:
        return ()
    return (f"the tasks come in the sequence of stream.order: {', '.join(names)}; without it they come as written",)
