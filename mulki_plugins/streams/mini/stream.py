"""The stream mtil-mini."""

from __future__ import annotations

from importlib.resources import files
from typing import Any, Literal

import yaml

from mulki_plugins.streams.mini.pictures import cached
from mulki_plugins.streams.names import order_notices, select_tasks
from mulki_plugins.streams.split import every_fifth, few, note_few
from mulki_plugins.streams.task import ArrayImages, Task, TaskStream
from mulki_plugins.types import Count

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
"""As in MTIL, order I is alphabetical and order II was drawn at random once."""


def mtil_mini(
    *,
    order: Literal["I", "II"] | list[str] | None = None,
    tasks: list[str] | None = None,
    evaluate_on: Literal["test", "validation"] = "test",
    shots: Count | None = None,
) -> TaskStream:
    """Eleven tasks of 800 training and 320 test images, 48 x 48 pixels, 10 to 60 classes each.

    The images are drawn on first use, which takes some seconds, and cached. MissingData if a package is missing.

    Args:
        order: I (alphabetical), II, or a list of names; null for the order of `tasks`, or I.
        tasks: Use only these tasks.
        evaluate_on: The `test` images, or `validation`: a fifth of each class's training images, held out of training.
        shots: Training images per class, drawn with a fixed seed; null for all.
    """
    entries = declared_tasks()
    names = select_tasks("mtil-mini", ORDERS, order, tasks)
    notices = list(order_notices(names, tasks))
    parts = tuple(_task(name, entries[name], evaluate_on, notices, shots) for name in names)
    return TaskStream(name="mtil-mini", tasks=parts, notices=tuple(notices))


def mtil_mini_reference() -> TaskStream:
    """Reference data for mtil-mini: 1,600 images in 186 classes, with no drawing and no name of the eleven tasks.

    It plays the part of ImageNet and CC's captions beside MTIL, for methods that distil on them (ZSCL, arXiv 2303.06628).
    """
    entries = declared_tasks("reference.yaml")
    notices: list[str] = []
    parts = tuple(_task(name, entry, "test", notices) for name, entry in entries.items())
    return TaskStream(name="mtil-mini-reference", tasks=parts, notices=tuple(notices))


def declared_tasks(file: str = "tasks.yaml") -> dict[str, dict[str, Any]]:
    """The content of tasks.yaml or reference.yaml."""
    text = files("mulki_plugins.streams.mini").joinpath(file).read_text("utf-8")
    entries: dict[str, dict[str, Any]] = yaml.safe_load(text)
    return entries


def _task(name: str, entry: dict[str, Any], evaluate_on: str, notices: list[str], shots: int | None = None) -> Task:
    drawn = cached(name, entry, "train", notices)
    train = ArrayImages(drawn.images, drawn.labels)
    if evaluate_on == "validation":
        held_out = every_fifth(drawn.labels)
        train, test = (ArrayImages(drawn.images[mask], drawn.labels[mask]) for mask in (~held_out, held_out))
    else:
        drawn = cached(name, entry, "test", notices)
        test = ArrayImages(drawn.images, drawn.labels)
    if shots is not None:
        if notice := note_few(name, tuple(entry["classes"]), train.labels, shots):
            notices.append(notice)
        train = train.take(few(train.labels, shots))
    templates = tuple(entry["templates"])
    return Task(name=name, class_names=tuple(entry["classes"]), templates=templates, train=train, test=test)
