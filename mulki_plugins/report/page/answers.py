"""What each run answered: its right answers image by image, and the intervals of its accuracies."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from mulki_plugins.errors import MulkiError
from mulki_plugins.metrics import wilson_interval
from mulki_plugins.report.predictions import read_predictions
from mulki_plugins.report.result import Result
from mulki_plugins.report.significance import Rights

_COUNTS = re.compile(r"\d+ \+ (\d+) images")

Interval = tuple[float, float]


@frozen(eq=False)
class Answers:
    """The right answers of a complete run: for each task an array [rows of the matrix, test images]."""

    rights: Rights
    labels: Sequence[NDArray[np.int64]]

    def comparable_with(self, other: Answers) -> bool:
        """Whether both runs were tested on the same images, as far as their labels tell."""
        return len(self.labels) == len(other.labels) and all(map(np.array_equal, self.labels, other.labels))


def read_answers(result: Result) -> tuple[Answers | None, str]:
    """The answers of a complete run; else None and the reason."""
    if not result.folder:
        return None, "it has no folder"
    try:
        predictions = read_predictions(Path(result.folder))
    except MulkiError as error:
        return None, error.message
    if predictions is None:
        return None, "it kept no predictions"
    tasks, rows = len(result.tasks), len(result.matrix)
    if predictions.tasks != result.tasks:
        return None, "its predictions are for other tasks than its result"
    first = 1 if predictions.rows[:1] == ["zero-shot"] else 0
    kept = len(predictions.rows) - first
    if kept < rows and not (kept <= 1 and _rows_are_equal(result)):
        return None, f"it kept predictions for {kept} of {rows} rows"
    # a run that learns everything at once, or nothing, keeps one row for all
    places = [first + i for i in range(rows)] if kept >= rows else [first + kept - 1] * rows
    counted = [np.all([predictions.counted(place, j) for place in places], axis=0) for j in range(tasks)]
    rights = [np.stack([predictions.right(place, j)[counted[j]] for place in places]) for j in range(tasks)]
    if not all(right.shape[1] for right in rights):
        return None, "it kept no predictions for a task's images"
    measured = np.array([100 * right.mean(1) for right in rights]).T
    if not np.allclose(measured, result.matrix, atol=0.01):
        return None, "its predictions do not give the accuracies of its result"
    return Answers(rights, [predictions.labels(j)[counted[j]] for j in range(tasks)]), ""


def _rows_are_equal(result: Result) -> bool:
    return all(row == result.matrix[0] for row in result.matrix)


def count_test_images(result: Result) -> list[int | None]:
    """The number of test images of each task, as the run recorded it; None where it did not."""
    recorded = result.identity.get("data")
    texts = [recorded.get(task) if isinstance(recorded, dict) else None for task in result.tasks]
    found = [_COUNTS.match(text) if isinstance(text, str) else None for text in texts]
    return [int(match[1]) if match else None for match in found]


def accuracy_interval(accuracy: float, images: int | None) -> Interval | None:
    """Wilson's interval of an accuracy in percent; None if it is not a share of so many images, as when some were left out."""
    if not images:
        return None
    right = accuracy * images / 100
    if not math.isclose(right, round(right), abs_tol=0.01):
        return None
    return wilson_interval(round(right), images)
