"""The stream mtil."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np

from mulki_plugins.errors import Mistakes
from mulki_plugins.streams.mtil.contents import Images
from mulki_plugins.streams.mtil.declaration import ORDERS
from mulki_plugins.streams.mtil.found import Found, look
from mulki_plugins.streams.mtil.root import root_folder
from mulki_plugins.streams.mtil.splits import few, random_split
from mulki_plugins.streams.selection import chosen, reordered
from mulki_plugins.streams.task import Task, TaskStream
from mulki_plugins.types import Count


def mtil(
    *,
    root: str = "data",
    order: Literal["I", "II"] | list[str] | None = None,
    tasks: list[str] | None = None,
    split: Literal["zscl", "coop"] = "zscl",
    shots: Count | None = None,
    download: bool = False,
) -> TaskStream:
    """The published MTIL from the user's disk: eleven data sets, 1,201 classes, in the folders that torchvision makes.

    root: the folder that holds theirs. order: I (alphabetical), II, or the names in the order wanted. tasks: only these, in
    the sequence in which they are written, or in that of `order` where it is given too. split: `zscl` is the official training
    and test part, or where there is none a random 80 % and the rest with seed 42; `coop` is CoOp's, from the user's
    `split_zhou_*.json`, with its class names and one template. shots: so many training images of each class, drawn once with
    a fixed seed. download: get what is missing and can be had.

    No image is opened here. MulkiError, of all data sets at once, where one is missing, damaged or cannot be downloaded.

    Args:
        root: Folder that holds the data sets' folders.
        order: I (alphabetical), II, or a list of names; null for the order as written.
        tasks: Use only these tasks.
        split: The official parts, or four fifths at random (`zscl`); or the published CoOp splits (`coop`).
        shots: Training images per class; null for all.
        download: Download the missing data sets that can be downloaded.
    """
    names = chosen("mtil", ORDERS, order, tasks)
    below = root_folder(root)
    found = [look(name, below, split) for name in names]
    if download and any(each.state == "missing" for each in found):
        from mulki_plugins.streams.mtil.fetch import fetch

        for each in found:
            if each.state == "missing" and not each.declared.get:
                fetch(each.declared, below)
        found = [look(name, below, split) for name in names]
    if wrong := unusable(found, below):
        raise Mistakes(wrong)
    built = [_task(each, shots) for each in found]
    return TaskStream(
        name="mtil",
        tasks=tuple(task for task, _ in built),
        notices=(*reordered(names, tasks), *(notice for _, notice in built if notice)),
        incomparable=tuple(_unlike_published(each) for each in found if each.differences),
    )


def unusable(found: list[Found], root: Path) -> list[str]:
    """Everything that keeps the stream from being built."""
    wrong = [f"{each.declared.name}: {problem}" for each in found for problem in each.problems]
    missing = [each for each in found if each.state == "missing"]
    wrong += [
        f"{each.declared.name} is missing: expected in {each.folder}; {each.declared.how_to_get(root)}"
        for each in missing
    ]
    if missing:
        wrong.append(
            "`stream.root` names the folder that holds the data; `mulki run mtil` needs none: it draws its own"
        )
    return wrong


def _unlike_published(found: Found) -> str:
    more = "; and more" if len(found.differences) > 3 else ""
    return (
        f"{found.declared.name} is not the published data set, and no number on it can be compared: "
        f"{'; '.join(found.differences[:3])}{more}; `mulki data check` says all"
    )


def _task(found: Found, shots: int | None) -> tuple[Task, str]:
    """A data set as a task, and what to tell whoever reads its numbers."""
    name, declared = found.declared.name, found.declared
    assert found.contents is not None
    parts: dict[str, Images] = dict(found.contents.parts)
    if "all" in parts:
        whole = parts.pop("all")
        parts["train"], parts["test"] = (whole.chosen(places) for places in random_split(len(whole)))
    notice = ""
    if shots is not None:
        counts = np.bincount(parts["train"].labels, minlength=len(found.class_names))
        if (short := counts < shots).any():
            at = int(np.flatnonzero(short)[0])
            notice = (
                f"note: {name}: {int(short.sum())} of {len(counts)} classes have fewer than {shots} training images, such as "
                f"{found.class_names[at]!r} with {int(counts[at])}; all of them are taken"
            )
        parts["train"] = parts["train"].chosen(few(parts["train"].labels, shots))
    templates = declared.templates[:1] if found.split == "coop" else declared.templates
    task = Task(name=name, class_names=found.class_names, templates=templates, train=parts["train"], test=parts["test"])
    return task, notice
