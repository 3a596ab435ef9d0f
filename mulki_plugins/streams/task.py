"""A task is one data set with its own class names and prompts; a stream is an ordered list of tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from attrs import frozen
from numpy.typing import NDArray
from PIL import Image


class LabelledImages(Protocol):
    """Images with class indices, as torchvision's data sets are; `targets` is known without decoding an image.

    Images that lie in files may have a method `path(index)`: those left out of a run are then recorded by their files, and
    test files that are training files are found.
    """

    @property
    def targets(self) -> Sequence[int]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Any, int]: ...


@frozen(eq=False)
class ArrayImages:
    """Images held in memory: uint8 [N, H, W, 3], and their class indices [N]."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]

    @property
    def targets(self) -> list[int]:
        labels: list[int] = self.labels.tolist()
        return labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), int(self.labels[index])


@frozen(kw_only=True, eq=False)
class Task:
    """One data set: what it is called, what its classes are called, and its images."""

    name: str
    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    """Sentences with `{}` in the class name's place; training uses the first, evaluation all."""
    train: LabelledImages
    test: LabelledImages


@frozen(kw_only=True, eq=False)
class TaskStream:
    """Tasks in the order in which they are learned."""

    name: str
    tasks: tuple[Task, ...]
    notices: tuple[str, ...] = ()
    """What whoever runs it must be told of its data."""
    incomparable: tuple[str, ...] = ()
    """What keeps numbers on it from standing beside published ones of the same name."""
