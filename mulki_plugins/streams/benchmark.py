"""A stream as an Avalanche benchmark with task labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from avalanche.benchmarks import benchmark_from_datasets, with_task_labels
from avalanche.benchmarks.scenarios import CLScenario
from avalanche.benchmarks.utils import (
    ConstantSequence,
    DataAttribute,
    TaskAwareSupervisedClassificationDataset,
    TaskLabels,
    TransformGroups,
)

from mulki_plugins.streams.task import LabelledImages, TaskStream

Transform = Callable[[Any], Any]


def as_benchmark(stream: TaskStream, train_transform: Transform, eval_transform: Transform) -> CLScenario:
    """An Avalanche benchmark with one experience a task, task label = position in the stream.

    Every experience also has `task_name` and `class_names`. Class indices are not offset from task to task.
    """
    transforms = {"train": (train_transform, None), "eval": (eval_transform, None)}
    benchmark = with_task_labels(
        benchmark_from_datasets(
            train=[_dataset(task.train, i, transforms, "train") for i, task in enumerate(stream.tasks)],
            test=[_dataset(task.test, i, transforms, "eval") for i, task in enumerate(stream.tasks)],
        )
    )
    for experiences in (benchmark.train_stream, benchmark.test_stream):
        for experience, task in zip(experiences, stream.tasks, strict=True):
            experience.task_name = task.name
            experience.class_names = task.class_names
    return benchmark


def _dataset(
    images: LabelledImages, task: int, transforms: dict[str, tuple[Transform, None]], group: str
) -> TaskAwareSupervisedClassificationDataset:
    """The class that Avalanche's plugins expect: with targets and task labels as attributes."""
    targets = DataAttribute(list(images.targets), name="targets")
    labels = TaskLabels(ConstantSequence(task, len(images)))
    dataset = TaskAwareSupervisedClassificationDataset(
        [images], data_attributes=[targets, labels], transform_groups=TransformGroups(transforms)
    )
    chosen: TaskAwareSupervisedClassificationDataset = dataset.with_transforms(group)
    return chosen
