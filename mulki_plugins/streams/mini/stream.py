"""The stream mtil-mini."""

from __future__ import annotations

from importlib.resources import files
from typing import Any, Literal

import yaml

from mulki_plugins.errors import MulkiError, did_you_mean
from mulki_plugins.streams.mini.cache import cached
from mulki_plugins.streams.task import ArrayImages, Task, TaskStream

ORDERS = {
    "I": ("animals", "digits", "faces", "flags", "food", "letters", "objects", "scans", "shapes", "textures", "travel"),
    "II": (
        "objects",
        "food",
        "digits",
        "animals",
        "shapes",
        "travel",
        "flags",
        "textures",
        "faces",
        "scans",
        "letters",
    ),
}
"""Order I is alphabetical, order II was drawn once at random, as in MTIL."""


def mtil_mini(*, order: Literal["I", "II"] | list[str] = "I", tasks: list[str] | None = None) -> TaskStream:
    """Eleven tasks of 800 training and 320 test images, 48 x 48 pixels, 10 to 60 classes each.

    order: I (alphabetical), II, or the names in the order wanted. tasks: only these, in that order's sequence.
    The images are drawn on first use, which takes some seconds, and cached. MissingData where a package is missing.
    """
    names = list(ORDERS[order] if isinstance(order, str) else order)
    for name in [*names, *(tasks or [])]:
        if name not in ORDERS["I"]:
            raise MulkiError(f"mtil-mini has no task {name!r} ({did_you_mean(name, ORDERS['I'])})")
    if len(set(names)) < len(names):
        raise MulkiError("mtil-mini: a task stands in the order twice")
    chosen = [name for name in names if tasks is None or name in tasks]
    if not chosen:
        raise MulkiError("mtil-mini: no task is left")
    entries = declared_tasks()
    return TaskStream(name="mtil-mini", tasks=tuple(_task(name, entries[name]) for name in chosen))


def declared_tasks() -> dict[str, dict[str, Any]]:
    """tasks.yaml as it stands."""
    text = files("mulki_plugins.streams.mini").joinpath("tasks.yaml").read_text("utf-8")
    entries: dict[str, dict[str, Any]] = yaml.safe_load(text)
    return entries


def _task(name: str, entry: dict[str, Any]) -> Task:
    splits = {split: cached(name, entry, split) for split in ("train", "test")}
    images = {split: ArrayImages(pictures.images, pictures.labels) for split, pictures in splits.items()}
    return Task(name=name, class_names=tuple(entry["classes"]), templates=tuple(entry["templates"]), **images)
