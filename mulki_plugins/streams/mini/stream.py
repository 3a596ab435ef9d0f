"""The stream mtil-mini."""

from __future__ import annotations

from importlib.resources import files
from typing import Any, Literal

import numpy as np
import yaml

from mulki_plugins.streams.mini.cache import cached
from mulki_plugins.streams.mini.pictures import Pictures
from mulki_plugins.streams.selection import chosen, reordered
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


def mtil_mini(
    *,
    order: Literal["I", "II"] | list[str] | None = None,
    tasks: list[str] | None = None,
    evaluate_on: Literal["test", "validation"] = "test",
) -> TaskStream:
    """Eleven tasks of 800 training and 320 test images, 48 x 48 pixels, 10 to 60 classes each.

    order: I (alphabetical), II, or the names in the order wanted. tasks: only these, in the sequence in which they are
    written, or in that of `order` where it is given too.
    evaluate_on: `validation` holds a fifth of each class's training images out of training and tests on those, so that
    settings are chosen without a look at the test images.
    The images are drawn on first use, which takes some seconds, and cached. MissingData where a package is missing.

    Args:
        order: I, II, or a list of names; null for the order as written.
        tasks: Use only these tasks.
        evaluate_on: The `test` images, or a held-out fifth of the training images (`validation`).
    """
    entries = declared_tasks()
    names = chosen("mtil-mini", ORDERS, order, tasks)
    notices = list(reordered(names, tasks))
    parts = tuple(_task(name, entries[name], evaluate_on, notices) for name in names)
    return TaskStream(name="mtil-mini", tasks=parts, notices=tuple(notices))


def mtil_mini_reference() -> TaskStream:
    """Reference data for mtil-mini: one task of 1,600 images in 186 classes, none of them drawn or named as in the eleven.

    As ImageNet and the captions of CC stand beside MTIL for methods that distil on them (ZSCL, arXiv 2303.06628).
    """
    entries = declared_tasks("reference.yaml")
    notices: list[str] = []
    parts = tuple(_task(name, entry, "test", notices) for name, entry in entries.items())
    return TaskStream(name="mtil-mini-reference", tasks=parts, notices=tuple(notices))


def declared_tasks(file: str = "tasks.yaml") -> dict[str, dict[str, Any]]:
    """tasks.yaml, or reference.yaml, as it stands."""
    text = files("mulki_plugins.streams.mini").joinpath(file).read_text("utf-8")
    entries: dict[str, dict[str, Any]] = yaml.safe_load(text)
    return entries


def _task(name: str, entry: dict[str, Any], evaluate_on: str, notices: list[str]) -> Task:
    pictures = {"train": cached(name, entry, "train", notices)}
    if evaluate_on == "validation":
        pictures["train"], pictures["test"] = held_out(pictures["train"])
    else:
        pictures["test"] = cached(name, entry, "test", notices)
    images = {split: ArrayImages(each.images, each.labels) for split, each in pictures.items()}
    return Task(name=name, class_names=tuple(entry["classes"]), templates=tuple(entry["templates"]), **images)


def held_out(pictures: Pictures) -> tuple[Pictures, Pictures]:
    """Training and validation part: of each class every fifth picture is held out."""
    order = np.argsort(pictures.labels, kind="stable")
    firsts = np.searchsorted(pictures.labels[order], pictures.labels[order])
    out = np.zeros(len(order), dtype=bool)
    out[order] = (np.arange(len(order)) - firsts) % 5 == 4
    train, validation = (Pictures(images=pictures.images[part], labels=pictures.labels[part]) for part in (~out, out))
    return train, validation
