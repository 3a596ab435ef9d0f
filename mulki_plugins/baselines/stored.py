"""Kept images as indices: where in which task's training set they lie, and the data set that they are."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from avalanche.benchmarks.utils import concat_datasets

from mulki_plugins.errors import MulkiError

Places = list[list[int]]
"""[task label, index in the training set of that task's experience] of each image, in order."""


def places_of(kept: Any) -> Places:
    """Of an Avalanche data set made of parts of the training sets of a benchmark of `as_benchmark`."""
    if not len(kept):
        return []
    if not hasattr(kept, "place"):
        what = "kept images have no `place`, so that they cannot be found again"
        raise MulkiError(what, "make the benchmark with mulki_plugins.streams.as_benchmark")
    return [[int(task), int(place)] for task, place in zip(kept.targets_task_labels, kept.place, strict=True)]


def images_at(places: Places, strategy: Any) -> Any:
    """The data set again, from the stream of the strategy's experience."""
    trained = {
        task: experience.dataset for experience in strategy.experience.origin_stream for task in experience.task_labels
    }
    runs = [(task, [place for _, place in run]) for task, run in groupby(places, key=lambda each: each[0])]
    return concat_datasets([trained[task].subset(indices) for task, indices in runs])
