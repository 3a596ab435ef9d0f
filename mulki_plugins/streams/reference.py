"""Reference data: images and texts of no task, on which some methods distil."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attrs import frozen
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from mulki_plugins.streams.task import LabelledImages, TaskStream


@frozen(eq=False)
class Reference:
    """What a method that needs reference data is given, beside the options of its recipe."""

    images: Dataset[Tensor]
    """Each [3, H, W], through the evaluation transform."""
    texts: tuple[str, ...]
    """Whole sentences, each once."""


def as_reference(stream: TaskStream, transform: Callable[[Any], Tensor]) -> Reference:
    """The training images of a stream's tasks, and the sentences of their classes in every template."""
    texts = [t.replace("{}", name) for task in stream.tasks for t in task.templates for name in task.class_names]
    images: Dataset[Tensor] = ConcatDataset([_Unlabelled(task.train, transform) for task in stream.tasks])
    return Reference(images, tuple(dict.fromkeys(texts)))


class _Unlabelled(Dataset[Tensor]):
    def __init__(self, images: LabelledImages, transform: Callable[[Any], Tensor]) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(self.images[index][0])
