"""Streams of image-classification tasks. The names below are loaded on first use, since most of them need torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mulki_plugins.libraries import load_lazily

if TYPE_CHECKING:
    from mulki_plugins.streams.benchmark import Reference, as_benchmark, as_reference
    from mulki_plugins.streams.mini.stream import mtil_mini
    from mulki_plugins.streams.task import ArrayImages, Task, TaskStream

__all__ = ["ArrayImages", "Reference", "Task", "TaskStream", "as_benchmark", "as_reference", "mtil_mini"]

__getattr__ = load_lazily(
    __name__,
    {
        "ArrayImages": "task",
        "Reference": "benchmark",
        "Task": "task",
        "TaskStream": "task",
        "as_benchmark": "benchmark",
        "as_reference": "benchmark",
        "mtil_mini": "mini.stream",
    },
    light=("task",),
)
