"""Images kept of earlier tasks: herded exemplars, and how a checkpoint refers to kept images without storing them."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch
from avalanche.benchmarks.utils import concat_datasets
from avalanche.training.storage_policy import ExemplarsBuffer
from torch import Tensor

from mulki_plugins.errors import MulkiError
from mulki_plugins.losses import herded
from mulki_plugins.models.classifier import ClipClassifier
from mulki_plugins.ranks.batches import in_order
from mulki_plugins.stages.protocols import Dataset, Strategy
from mulki_plugins.stages.statistics import evaluating, evaluation_batches

Indices = list[list[int]]
"""[task label, index in the training set of that task's experience] of each image, in order."""


def indices_of(images: Any) -> Indices:
    """Where the images of an Avalanche data set lie in the training sets of a benchmark made by `as_benchmark`."""
    if not len(images):
        return []
    if not hasattr(images, "place"):
        problem = "kept images have no `place`, so a checkpoint cannot refer to them"
        raise MulkiError(problem, "make the benchmark with mulki_plugins.streams.as_benchmark")
    return [[int(task), int(index)] for task, index in zip(images.targets_task_labels, images.place, strict=True)]


def images_at(indices: Indices, strategy: Strategy) -> Any:
    """The inverse of `indices_of`: the data set, from the stream of the strategy's experience."""
    training_sets = {
        task: experience.dataset for experience in strategy.experience.origin_stream for task in experience.task_labels
    }
    runs = [(task, [index for _, index in run]) for task, run in groupby(indices, key=lambda pair: pair[0])]
    return concat_datasets([training_sets[task].subset(run) for task, run in runs])


class HerdedExemplars(ExemplarsBuffer):
    """At most `max_size` images of the tasks so far, the same number of each class, or one more.

    `herded` selects them at the end of the class's task by the model's unit-norm features, through the evaluation transform,
    so that their mean is near the class's. When new classes need room, each class gives up the exemplars selected last; with
    more classes than room, the classes learned first keep one each.
    """

    def __init__(self, max_size: int) -> None:
        super().__init__(max_size)
        self.groups: dict[tuple[int, int], Any] = {}
        """Exemplars by (task, class)."""
        self._loaded: list[list[Any]] = []

    def add(self, model: ClipClassifier, dataset: Dataset) -> None:
        """Select exemplars among a task's training images, and shrink the other classes' shares."""
        features, classes, tasks = _encode(model, dataset)
        for task, c in sorted({(int(t), int(c)) for t, c in zip(tasks, classes, strict=True)}):
            rows = ((tasks == task) & (classes == c)).nonzero()[:, 0]
            self.groups[task, c] = dataset.subset(rows[herded(features[rows], self.max_size)].tolist())
        self._fit()

    def resize(self, strategy: Any, new_size: int) -> None:
        self.max_size = new_size
        self._fit()

    def _fit(self) -> None:
        room, more = divmod(self.max_size, max(1, len(self.groups)))
        for i, (key, images) in enumerate(self.groups.items()):
            self.groups[key] = images.subset(range(min(room + (i < more), len(images))))
        self.buffer = concat_datasets([images for images in self.groups.values() if len(images)])

    def state_dict(self) -> dict[str, Any]:
        """The task and index of each exemplar; no image is stored."""
        return {"groups": self._loaded or [[*group, indices_of(images)] for group, images in self.groups.items()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._loaded = state["groups"]

    def restore(self, strategy: Strategy) -> None:
        """Take the images of a loaded state from the strategy's stream."""
        if self._loaded:
            self.groups = {(task, c): images_at(indices, strategy) for task, c, indices in self._loaded}
            self._loaded = []
            self._fit()


@torch.no_grad()
def _encode(model: ClipClassifier, dataset: Dataset) -> tuple[Tensor, Tensor, Tensor]:
    """Features [N, d], classes [N] and task labels [N] of a training set."""
    with evaluating(model):
        batches = [
            (model.encode_image(x.to(model.scale.device)).float().cpu(), y, tasks)
            for x, y, tasks in evaluation_batches(dataset, shared=True)
        ]
    every = in_order(batches)
    features, classes, tasks = (torch.cat(each) for each in zip(*every, strict=True))
    return features, classes, tasks
