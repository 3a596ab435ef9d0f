"""A stream as an Avalanche benchmark with task labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from avalanche.benchmarks import benchmark_from_datasets, with_task_labels
from avalanche.benchmarks.scenarios import CLScenario
from avalanche.benchmarks.utils import (
    ConstantSequence,
    DataAttribute,
    TaskAwareSupervisedClassificationDataset,
    TaskLabels,
    TransformGroups,
)

from mulki_plugins.streams.readable import ReadableImages
from mulki_plugins.streams.task import LabelledImages, TaskStream

Transform = Callable[[Any], Any]


def as_benchmark(
    stream: TaskStream,
    train_transform: Transform,
    eval_transform: Transform,
    *,
    unreadable: Literal["stop", "skip"] = "stop",
) -> CLScenario:
    """An Avalanche benchmark with one experience a task, task label = position in the stream.

    Every experience also has `task_name`, `class_names` and `images` (ReadableImages). Class indices are not offset from
    task to task. unreadable: what happens at an image that cannot be read.
    """
    read = {
        "train": [ReadableImages(t.train, t.name, training=True, unreadable=unreadable) for t in stream.tasks],
        "test": [ReadableImages(t.test, t.name, training=False, unreadable=unreadable) for t in stream.tasks],
    }
    transforms = {"train": (train_transform, None), "eval": (eval_transform, None)}
    benchmark = with_task_labels(
        benchmark_from_datasets(
            train=[_dataset(images, i, transforms, "train") for i, images in enumerate(read["train"])],
            test=[_dataset(images, i, transforms, "eval") for i, images in enumerate(read["test"])],
        )
    )
    for part, experiences in (("train", benchmark.train_stream), ("test", benchmark.test_stream)):
        for experience, task, images in zip(experiences, stream.tasks, read[part], strict=True):
            experience.task_name = task.name
            experience.class_names = task.class_names
            experience.images = images
    return benchmark


def _dataset(
    images: LabelledImages, task: int, transforms: dict[str, tuple[Transform, None]], group: str
) -> TaskAwareSupervisedClassificationDataset:
    """The class that Avalanche's plugins expect: with targets and task labels as attributes."""
    targets = DataAttribute(list(images.targets), name="targets")
    labels = TaskLabels(ConstantSequence(task, len(images)))
    places = DataAttribute(range(len(images)), name="place")  # by which a plugin's kept images are found again
    dataset = TaskAwareSupervisedClassificationDataset(
        [images], data_attributes=[targets, labels, places], transform_groups=TransformGroups(transforms)
    )
    chosen: TaskAwareSupervisedClassificationDataset = dataset.with_transforms(group)
    return chosen
