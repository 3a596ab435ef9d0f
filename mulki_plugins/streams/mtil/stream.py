"""The stream mtil."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from mulki_plugins.errors import Mistakes
from mulki_plugins.streams.mtil.contents import Images
from mulki_plugins.streams.mtil.dataset import DatasetOnDisk, look
from mulki_plugins.streams.mtil.declaration import ORDERS, root_folder
from mulki_plugins.streams.names import order_notices, select_tasks
from mulki_plugins.streams.split import few, note_few, random_split
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
    """The published MTIL from the user's disk: eleven data sets, 1,201 classes, in torchvision's folder layouts.

    No image is opened here. MulkiError, for all data sets at once, if one is missing, damaged or cannot be downloaded.

    Args:
        root: Folder that holds the data sets' folders.
        order: I (alphabetical), II, or a list of names; null for the order of `tasks`, or I.
        tasks: Use only these tasks.
        split: The official parts, or a random 80 % for training if there are none (`zscl`); or CoOp's, from the user's
            `split_zhou_*.json`, with its class names and one template (`coop`).
        shots: Training images per class, drawn with a fixed seed; null for all.
        download: Download the missing data sets that can be downloaded.
    """
    names = select_tasks("mtil", ORDERS, order, tasks)
    folder = root_folder(root)
    datasets = [look(name, folder, split) for name in names]
    if download and any(dataset.state == "missing" for dataset in datasets):
        from mulki_plugins.streams.mtil.fetch import fetch

        for dataset in datasets:
            if dataset.state == "missing" and not dataset.declared.get:
                fetch(dataset.declared, folder)
        datasets = [look(name, folder, split) for name in names]
    if mistakes := _unusable(datasets, folder):
        raise Mistakes(mistakes)
    built = [_build_task(dataset, shots) for dataset in datasets]
    return TaskStream(
        name="mtil",
        tasks=tuple(task for task, _ in built),
        notices=(*order_notices(names, tasks), *(notice for _, notice in built if notice)),
        incomparable=tuple(_describe_differences(dataset) for dataset in datasets if dataset.differences),
    )


def _unusable(datasets: list[DatasetOnDisk], root: Path) -> list[str]:
    """Everything that keeps the stream from being built."""
    mistakes = [f"{dataset.declared.name}: {problem}" for dataset in datasets for problem in dataset.problems]
    missing = [dataset for dataset in datasets if dataset.state == "missing"]
    for dataset in missing:
        advice = dataset.declared.how_to_get(root)
        mistakes.append(f"{dataset.declared.name} is missing: expected in {dataset.folder}; {advice}")
    if missing:
        mistakes.append(
            "`stream.root` names the folder of the data; `mulki run mtil` needs none: it draws its own images"
        )
    return mistakes


def _describe_differences(dataset: DatasetOnDisk) -> str:
    more = "; and more" if len(dataset.differences) > 3 else ""
    return (
        f"{dataset.declared.name} is not the published data set, and no number on it can be compared: "
        f"{'; '.join(dataset.differences[:3])}{more}; `mulki data check` lists all differences"
    )


def _build_task(dataset: DatasetOnDisk, shots: int | None) -> tuple[Task, str]:
    """A data set as a task, and a notice for readers of its numbers, or an empty text."""
    declared = dataset.declared
    assert dataset.contents is not None
    parts: dict[str, Images] = dict(dataset.contents.parts)
    if "all" in parts:
        whole = parts.pop("all")
        parts["train"], parts["test"] = (whole.take(indices) for indices in random_split(len(whole)))
    notice = ""
    if shots is not None:
        notice = note_few(declared.name, dataset.class_names, parts["train"].labels, shots)
        parts["train"] = parts["train"].take(few(parts["train"].labels, shots))
    templates = declared.templates[:1] if dataset.split == "coop" else declared.templates
    names = dataset.class_names
    return Task(
        name=declared.name, class_names=names, templates=templates, train=parts["train"], test=parts["test"]
    ), notice
