"""Which tasks, and in which order."""

from __future__ import annotations

from mulki_plugins.errors import MulkiError, did_you_mean
from mulki_plugins.streams.mtil.declaration import ORDERS


def chosen(order: str | list[str], tasks: list[str] | None) -> list[str]:
    """The names of the tasks in their order. MulkiError where one is unknown, stands twice, or none is left."""
    names = list(ORDERS[order] if isinstance(order, str) else order)
    for name in [*names, *(tasks or [])]:
        if name not in ORDERS["I"]:
            raise MulkiError(f"mtil has no task {name!r} ({did_you_mean(name, ORDERS['I'])})")
    if len(set(names)) < len(names):
        raise MulkiError("mtil: a task stands in the order twice")
    left = [name for name in names if tasks is None or name in tasks]
    if not left:
        raise MulkiError("mtil: no task is left")
    return left
