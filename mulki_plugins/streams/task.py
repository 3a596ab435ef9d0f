"""A task is one data set with its own class names and prompts; a stream is an ordered list of tasks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from attrs import evolve, frozen
from PIL import Image

from mulki_plugins.errors import MulkiError, did_you_mean, format_value

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

    def take(self, indices: NDArray[np.int64]) -> ArrayImages:
        """The images at these indices, copied."""
        return ArrayImages(self.images[indices], self.labels[indices])


@frozen(eq=False)
class SomeImages:
    """The images of another collection at some indices."""

    images: LabelledImages
    indices: list[int]

    @property
    def targets(self) -> list[int]:
        targets = self.images.targets
        return [int(targets[index]) for index in self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.images[self.indices[index]]


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
    held_out: tuple[Task, ...] = ()
    """Tasks that are tested and never learned; a recipe's `evaluate.held_out` names them."""


def hold_out(stream: TaskStream, names: Sequence[str]) -> TaskStream:
    """The stream with these of its tasks held out. MulkiError if it has no such task, or if none is left to learn."""
    tasks = {task.name: task for task in stream.tasks}
    for name in names:
        if name not in tasks:
            what = f"$.evaluate.held_out: the stream has no task {format_value(name)} ({did_you_mean(name, tasks)})"
            raise MulkiError(what, "a held-out task must be one of the stream's; it is tested, never trained")
    learned = tuple(task for task in stream.tasks if task.name not in names)
    if not learned:
        raise MulkiError("$.evaluate.held_out: every task of the stream is held out, so none is left to learn")
    return evolve(stream, tasks=learned, held_out=tuple(tasks[name] for name in names))


def with_template(stream: TaskStream, template: str) -> TaskStream:
    """The stream with one sentence for the classes of all its tasks."""
    tasks, held_out = (
        tuple(evolve(task, templates=(template,)) for task in part) for part in (stream.tasks, stream.held_out)
    )
    return evolve(stream, tasks=tasks, held_out=held_out)
