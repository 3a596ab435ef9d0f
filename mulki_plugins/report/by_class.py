"""Predictions by class: accuracy, what a class is confused with, the confusion matrix, and the worst images."""

from __future__ import annotations

from typing import Any

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from mulki_plugins.errors import MulkiError, did_you_mean
from mulki_plugins.report.formats import Cell, Table
from mulki_plugins.report.predictions import UNREAD, Predictions
from mulki_plugins.report.result import Result


@frozen(kw_only=True)
class ClassAccuracy:
    """The test images of one class."""

    index: int
    """Over all classes of the stream."""
    images: int
    """Those that could be read at the end."""
    accuracies: dict[str, float | None]
    """In percent, by row: `zero-shot`, `just learned` and `last`; None without an image that could be read."""
    confused_with: list[tuple[int, int]]
    """The wrong classes of the last row and how often each was predicted, the most frequent first."""


@frozen(kw_only=True)
class WorstImage:
    """A test image that was classified wrong with much confidence."""

    file: str
    label: int
    predicted: int
    confidence: float


def find_task(predictions: Predictions, name: str) -> int:
    """The index of a task. MulkiError if the run has no task of that name."""
    if name not in predictions.tasks:
        known = predictions.tasks
        raise MulkiError(f"{name}: the run has no task of that name", did_you_mean(name, known))
    return predictions.tasks.index(name)


def rows_shown(predictions: Predictions, task: int) -> dict[str, int]:
    """The rows of `ClassAccuracy.accuracies` as far as they were kept, each with its index."""
    last = len(predictions.rows) - 1
    rows = {"zero-shot": 0, "just learned": task + 1, "last": last}
    return {name: row for name, row in rows.items() if row <= last and (name == "last" or row < last)}


def accuracy_by_class(predictions: Predictions, task: int) -> list[ClassAccuracy]:
    """The accuracy on each class of a task, in the order of its class names."""
    rows = rows_shown(predictions, task)
    labels, predicted = predictions.labels(task), predictions.predicted(rows["last"], task)
    found = []
    for index in _classes_of(predictions, task):
        mine = labels == index
        wrong, counts = np.unique(predicted[mine & (predicted != index) & (predicted != UNREAD)], return_counts=True)
        order = np.lexsort((wrong, -counts))
        found.append(
            ClassAccuracy(
                index=index,
                images=int((mine & predictions.counted(rows["last"], task)).sum()),
                accuracies={name: _accuracy(predictions, row, task, mine) for name, row in rows.items()},
                confused_with=[(int(wrong[i]), int(counts[i])) for i in order],
            )
        )
    return found


def confusion(predictions: Predictions, task: int) -> tuple[list[int], NDArray[np.int64]]:
    """The confusion matrix of a task at the end: rows are its classes, columns the classes that were predicted [R, C].

    Returns the columns' classes too: the task's own, then those of other tasks that were predicted at least once.
    """
    row = rows_shown(predictions, task)["last"]
    labels, predicted = predictions.labels(task), predictions.predicted(row, task)
    own = _classes_of(predictions, task)
    others = sorted(set(np.unique(predicted[predicted != UNREAD]).tolist()) - set(own))
    every = [*own, *others]
    counts = np.zeros((len(predictions.classes), len(predictions.classes)), dtype=np.int64)
    read = predicted != UNREAD
    np.add.at(counts, (labels[read], predicted[read]), 1)
    return every, counts[np.ix_(own, every)]


def worst_images(predictions: Predictions, task: int, most: int) -> list[WorstImage]:
    """The images that are classified wrong at the end, those with the most confidence first."""
    row = rows_shown(predictions, task)["last"]
    wrong = np.flatnonzero(~predictions.right(row, task) & predictions.counted(row, task))
    sure, labels, predicted = (
        predictions.confidence(row, task),
        predictions.labels(task),
        predictions.predicted(row, task),
    )
    order = wrong[np.argsort(-sure[wrong], kind="stable")][:most]
    return [
        WorstImage(
            file=predictions.file(task, int(i)),
            label=int(labels[i]),
            predicted=int(predicted[i]),
            confidence=float(sure[i]),
        )
        for i in order
    ]


def class_name(predictions: Predictions, index: int, task: int) -> str:
    """A class by its name, with its task if that is another one."""
    owner, name = predictions.classes[index]
    return name if owner == task else f"{name} ({predictions.tasks[owner]})"


def class_tables(result: Result, predictions: Predictions, task: int, worst: int, title: str) -> list[Table]:
    """The table of a task's classes, the worst classes first, and that of its worst images."""
    rows = list(rows_shown(predictions, task))
    classes = sorted(accuracy_by_class(predictions, task), key=_worst_first)
    body: list[list[Cell]] = []
    for each in classes:
        named = [f"{class_name(predictions, index, task)} {count}" for index, count in each.confused_with[:2]]
        accuracies: list[Cell] = [each.accuracies[row] for row in rows]
        body.append([class_name(predictions, each.index, task), str(each.images), *accuracies, ", ".join(named)])
    head = ["class", "images", *rows, "most confused with"]
    tables = [Table(title=title, head=head, rows=body, digits=1, foot=_left_out(result, predictions.tasks[task]))]
    if images := worst_images(predictions, task, worst):
        lines: list[list[Cell]] = [
            [
                image.file, class_name(predictions, image.label, task), class_name(predictions, image.predicted, task),
                image.confidence,
            ]
            for image in images
        ]  # fmt: skip
        head = ["image", "class", "predicted", "confidence"]
        tables.append(Table(title=f"{title}: worst images", head=head, rows=lines, labels=3, longest=None))
    return tables


def confusion_table(predictions: Predictions, task: int, title: str) -> Table:
    """The confusion matrix as a table of counts."""
    columns, counts = confusion(predictions, task)
    names = [class_name(predictions, index, task) for index in columns]
    body: list[list[Cell]] = [
        [name, *(str(count) for count in row)] for name, row in zip(names, counts.tolist(), strict=False)
    ]
    return Table(title=title, head=["class", *names], rows=body)


def class_data(result: Result, predictions: Predictions, task: int, worst: int) -> dict[str, Any]:
    """The same as plain data."""

    def named(index: int) -> dict[str, str]:
        owner, name = predictions.classes[index]
        return {"task": predictions.tasks[owner], "class": name}

    name = predictions.tasks[task]
    return {
        "folder": result.folder, "task": name, "after": predictions.rows[-1],
        "classes": [
            {
                "class": predictions.classes[each.index][1], "images": each.images,
                **{row.replace("-", "_").replace(" ", "_"): value for row, value in each.accuracies.items()},
                "confused_with": [{**named(index), "images": count} for index, count in each.confused_with],
            }
            for each in accuracy_by_class(predictions, task)
        ],
        "worst_images": [
            {
                "file": image.file, "class": predictions.classes[image.label][1], "predicted": named(image.predicted),
                "confidence": round(image.confidence, 3),
            }
            for image in worst_images(predictions, task, worst)
        ],
        "left_out": result.left_out.get(f"{name}/test", []),
    }  # fmt: skip


def _classes_of(predictions: Predictions, task: int) -> list[int]:
    return [index for index, (owner, _) in enumerate(predictions.classes) if owner == task]


def _accuracy(predictions: Predictions, row: int, task: int, mine: NDArray[np.bool_]) -> float | None:
    counted = int((predictions.counted(row, task) & mine).sum())
    return 100 * int((predictions.right(row, task) & mine).sum()) / counted if counted else None


def _worst_first(each: ClassAccuracy) -> tuple[bool, float]:
    value = each.accuracies["last"]
    return value is None, 0.0 if value is None else value


def _left_out(result: Result, task: str) -> list[str]:
    names = result.left_out.get(f"{task}/test", [])
    if not names:
        return []
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return [f"left out, since they could not be read: {', '.join(map(str, names[:3]))}{more}"]
