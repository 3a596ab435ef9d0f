"""A task is one data set with its own class names and prompts; a stream is an ordered list of tasks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from attrs import frozen
from PIL import Image

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class LabelledImages(Protocol):
    """Images with class indices, like torchvision's data sets; `targets` is known without decoding an image.

    Images in files may have a method `path(index)`. Skipped images are then recorded by path, and a run warns of test files
    that are training files too.

    Images that are the same at every reading may have a method `fingerprint()`: a text that is another whenever one of them
    is, apart from the files of `path`, whose size and times tell. Test images are then decoded and resized once
    (`evaluate.cache`). None for images that must not be cached.
    """

    @property
    def targets(self) -> Sequence[int]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Any, int]: ...


@frozen(eq=False)
class ArrayImages:
    """Images in memory, uint8 [N, H, W, 3], and their class indices [N]."""

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

    def fingerprint(self) -> str:
        """A hash of all pixels."""
        return hash_pixels(self.images)


def hash_pixels(*arrays: NDArray[Any]) -> str:
    """A hash of arrays with their shapes."""
    import numpy as np

    text = hashlib.sha256()
    for array in arrays:
        text.update(f"{array.dtype} {array.shape}".encode())
        text.update(np.ascontiguousarray(array).data)
    return text.hexdigest()


@frozen(kw_only=True, eq=False)
class Task:
    """One data set: its name, class names, prompt templates and images."""

    name: str
    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    """Sentences with `{}` in the class name's place; training uses the first, evaluation all."""
    train: LabelledImages
    test: LabelledImages
    licence: str = ""
    """The licence of its images, if it is declared, for the card of an exported model."""


@frozen(kw_only=True, eq=False)
class TaskStream:
    """Tasks in the order of learning."""

    name: str
    tasks: tuple[Task, ...]
    notices: tuple[str, ...] = ()
    """Notices about the data, for whoever runs the stream."""
    incomparable: tuple[str, ...] = ()
    """Reasons why numbers on it cannot be compared with published ones."""
