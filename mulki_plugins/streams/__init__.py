"""Streams of image-classification tasks. The names below are loaded when they are used, since they bring torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mulki_plugins.streams.benchmark import as_benchmark
    from mulki_plugins.streams.mini.stream import mtil_mini
    from mulki_plugins.streams.reference import Reference, as_reference
    from mulki_plugins.streams.task import ArrayImages, Task, TaskStream

__all__ = ["ArrayImages", "Reference", "Task", "TaskStream", "as_benchmark", "as_reference", "mtil_mini"]

_HOMES = {
    "ArrayImages": "task",
    "Reference": "reference",
    "Task": "task",
    "TaskStream": "task",
    "as_benchmark": "benchmark",
    "as_reference": "reference",
    "mtil_mini": "mini.stream",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
