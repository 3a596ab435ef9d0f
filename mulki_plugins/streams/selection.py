"""Some of a data set's images: the classes of a step, or the validation images of a task."""

from __future__ import annotations

from typing import Any

import numpy as np
from attrs import evolve, frozen
from numpy.typing import NDArray

from mulki_plugins.errors import MulkiError
from mulki_plugins.streams.images import FileImages
from mulki_plugins.streams.mtil.contents import PixelImages
from mulki_plugins.streams.split import every_fifth
from mulki_plugins.streams.task import ArrayImages, LabelledImages, Task


def select_images(images: LabelledImages, indices: NDArray[np.int64], labels: NDArray[np.int64]) -> LabelledImages:
    """The images at these indices [n], with these labels [n]."""
    if isinstance(images, (ArrayImages, FileImages, PixelImages)):
        return evolve(images.take(indices), labels=labels)
    some = _FileSelection if callable(getattr(images, "path", None)) else _Selection
    return some(images, indices, labels)


def with_validation(task: Task) -> Task:
    """The task with every fifth training image of each class held out, and tested in place of the test images.

    MulkiError if no class has five training images.
    """
    labels = np.asarray(task.train.targets, dtype=np.int64)
    held_out = every_fifth(labels)
    if not held_out.any():
        raise MulkiError(
            f"{task.name}: no class has five training images, so there are none for validation",
            "test on its test images, with `evaluate_on: test`, or give it more `shots`",
        )
    train, test = (select_images(task.train, np.flatnonzero(part), labels[part]) for part in (~held_out, held_out))
    return evolve(task, train=train, test=test)


@frozen(eq=False)
class _Selection:
    """Some of the images of a data set of another package, with other labels."""

    whole: Any
    indices: NDArray[np.int64]
    labels: NDArray[np.int64]

    @property
    def targets(self) -> list[int]:
        labels: list[int] = self.labels.tolist()
        return labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.whole[int(self.indices[index])][0], int(self.labels[index])

    def fingerprint(self) -> str | None:
        """That of the data set, with the selection; None if it has none."""
        of_whole = getattr(self.whole, "fingerprint", None)
        known = of_whole() if callable(of_whole) else None
        return None if known is None else f"{known} of {','.join(map(str, self.indices.tolist()))}"


@frozen(eq=False)
class _FileSelection(_Selection):
    """The same of images in files."""

    def path(self, index: int) -> str:
        return str(self.whole.path(int(self.indices[index])))
