"""A stream for Avalanche: a benchmark with task labels, what happens to unreadable images, and reference data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from attrs import frozen
from avalanche.benchmarks import benchmark_from_datasets, with_task_labels
from avalanche.benchmarks.scenarios import CLScenario
from avalanche.benchmarks.utils import (
    ConstantSequence,
    DataAttribute,
    TaskAwareSupervisedClassificationDataset,
    TaskLabels,
    TransformGroups,
)
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, get_worker_info

from mulki_plugins.characters import printable
from mulki_plugins.errors import MulkiError, UnreadableImage
from mulki_plugins.registry.guard import place_of
from mulki_plugins.streams.cache import PixelCache
from mulki_plugins.streams.pixels import (
    CachedImages,
    OfOriginal,
    SplitTransform,
    ToNumbers,
    ToPixels,
    cached_images,
    split_transform,
)
from mulki_plugins.streams.task import LabelledImages, TaskStream

Transform = Callable[[Any], Any]
Unreadable = Literal["stop", "skip"]

UNREADABLE_LABEL = -1
"""Label of a test image that could not be read."""

MAX_CONSECUTIVE = 100
"""More unreadable images in a row are no accident: the run ends."""


def as_benchmark(
    stream: TaskStream,
    train_transform: Transform,
    eval_transform: Transform,
    *,
    unreadable: Unreadable = "stop",
    cache: PixelCache | None = None,
) -> CLScenario:
    """An Avalanche benchmark with one experience per task, whose task label is its position in the stream.

    Each experience also has `task_name`, `class_names` and `images` (ReadableImages). Class indices start at 0 in each task.
    Held-out tasks have test images only, in `held_out_stream`, with the task labels after those of the stream.
    unreadable: whether an image that cannot be read stops the run or is skipped. cache: where test images are kept once they
    are decoded and resized. Their data sets then have a third group of transforms, `pixels`, which gives uint8 [3, H, W].
    """
    split = None if cache is None else split_transform(eval_transform)
    if cache is not None and split is None:
        cache.note("the model's evaluation transform cannot be split; every evaluation decodes the test images again")
    images: dict[str, list[ReadableImages]] = {
        "train": [ReadableImages(t.train, t.name, training=True, unreadable=unreadable) for t in stream.tasks],
        **{
            kind: [
                ReadableImages(t.test, t.name, training=False, unreadable=unreadable, cache=cache, split=split)
                for t in tasks
            ]
            for kind, tasks in (("test", stream.tasks), ("held_out", stream.held_out))
        },
    }
    transforms = {"train": train_transform, "eval": eval_transform}
    first = {"train": 0, "test": 0, "held_out": len(stream.tasks)}
    datasets = {
        kind: [
            _dataset(part, first[kind] + i, transforms, "train")
            if kind == "train"
            else _dataset(part, first[kind] + i, part.adapt(transforms), "eval")
            for i, part in enumerate(parts)
        ]
        for kind, parts in images.items()
    }
    benchmark = with_task_labels(benchmark_from_datasets(**datasets))
    for kind, tasks in (("train", stream.tasks), ("test", stream.tasks), ("held_out", stream.held_out)):
        for experience, task, part in zip(benchmark.streams[kind], tasks, images[kind], strict=True):
            experience.task_name = task.name
            experience.class_names = task.class_names
            experience.images = part
    return benchmark


def _dataset(
    images: LabelledImages, task: int, transforms: dict[str, Transform], group: str
) -> TaskAwareSupervisedClassificationDataset:
    """The class that Avalanche's plugins expect, with targets and task labels as attributes."""
    targets = DataAttribute(list(images.targets), name="targets")
    labels = TaskLabels(ConstantSequence(task, len(images)))
    indices = DataAttribute(range(len(images)), name="place")  # a resumed plugin finds its stored images by it
    dataset = TaskAwareSupervisedClassificationDataset(
        [images],
        data_attributes=[targets, labels, indices],
        transform_groups=TransformGroups({name: (transform, None) for name, transform in transforms.items()}),
    )
    transformed: TaskAwareSupervisedClassificationDataset = dataset.with_transforms(group)
    return transformed


class ReadableImages:
    """A task's images. One that cannot be read raises UnreadableImage, or is skipped (`unreadable="skip"`).

    In training, the next readable image replaces a skipped one, so that batches keep their size. In evaluation its label is
    UNREADABLE_LABEL, and it counts neither as right nor as wrong.
    """

    def __init__(
        self,
        images: LabelledImages,
        name: str,
        *,
        training: bool,
        unreadable: Unreadable,
        cache: PixelCache | None = None,
        split: SplitTransform | None = None,
    ) -> None:
        self.images, self.name, self.training, self.unreadable = images, name, training, unreadable
        self.cached: CachedImages | None = None
        """The images as Pictures, if the cache can hold them."""
        if cache is not None and split is not None:
            self.cached = cached_images(images, name, split, cache, skip=unreadable == "skip")
        self._labels = np.asarray(images.targets)
        self._left_out = torch.zeros(len(images), dtype=torch.bool)
        if unreadable == "skip":
            self._left_out.share_memory_()  # type: ignore[no-untyped-call]  # torch has no annotation for it

    @property
    def targets(self) -> Sequence[int]:
        return self.images.targets

    @property
    def left_out(self) -> list[int] | list[str]:
        """The images skipped so far: their paths, or their indices if the stream's images have no `path`."""
        indices: list[int] = self._left_out.nonzero()[:, 0].tolist()
        path = getattr(self.images, "path", None)
        return [printable(str(path(index))) for index in indices] if callable(path) else indices

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        for step in range(min(len(self), MAX_CONSECUTIVE)):
            read = (index + step) % len(self)
            try:
                image, label = (self.images if self.cached is None else self.cached)[read]
                if hasattr(image, "load"):
                    image.load()  # Pillow decodes as late as it can
                break
            except BaseException as error:  # decoders raise anything; SystemExit would end a worker
                if isinstance(error, KeyboardInterrupt) and get_worker_info() is None:
                    raise
                if self.unreadable == "stop":
                    raise self._error(index, error) from error
                self._left_out[read] = True
                last = error
        else:
            raise self._error(read, last, f"{step + 1} consecutive images could not be read; the last error: ")
        if label != self._labels[read]:
            what = f"{self.name}: {self._kind} image {read} comes with class {label}, but its target is {self._labels[read]}"
            raise MulkiError(what, "the stream must keep images and targets in the same order")
        return image, label if self.training or step == 0 else UNREADABLE_LABEL

    def adapt(self, transforms: dict[str, Transform]) -> dict[str, Transform]:
        """Transforms `train` and `eval` of images as those of Pictures, and `pixels`; unchanged if nothing is cached."""
        if self.cached is None:
            return transforms
        return {
            "train": OfOriginal(transforms["train"]),
            "eval": ToNumbers(self.cached.split),
            "pixels": ToPixels(),
        }

    @property
    def _kind(self) -> str:
        return "training" if self.training else "test"

    def _error(self, index: int, error: BaseException, prefix: str = "") -> UnreadableImage:
        if isinstance(error, MulkiError):
            return UnreadableImage(prefix + error.message, error.hint)
        package = type(self.images).__module__.partition(".")[0]
        where = "" if package == "mulki_plugins" else place_of(error, package)
        reason = f"{type(error).__name__}: {error}".replace("\n", " ") + (f" ({where})" if where else "")
        return UnreadableImage(f"{prefix}{self.name}: {self._kind} image {index} cannot be read: {reason}")


@frozen(eq=False)
class Reference:
    """Images and sentences that belong to no task, for methods that distil on reference data."""

    images: Dataset[Tensor]
    """Each [3, H, W], after the evaluation transform."""
    texts: tuple[str, ...]
    """Whole sentences, without duplicates."""


def as_reference(
    stream: TaskStream, transform: Callable[[Any], Tensor], *, unreadable: Unreadable = "stop"
) -> Reference:
    """The training images of a stream's tasks, and the sentences of their classes in every template.

    unreadable: whether an image that cannot be read stops the run, or the next one takes its place.
    """
    texts = [t.replace("{}", name) for task in stream.tasks for t in task.templates for name in task.class_names]
    parts = [ReadableImages(t.train, t.name, training=True, unreadable=unreadable) for t in stream.tasks]
    images: Dataset[Tensor] = ConcatDataset([_Unlabelled(part, transform) for part in parts])
    return Reference(images, tuple(dict.fromkeys(texts)))


class _Unlabelled(Dataset[Tensor]):
    def __init__(self, images: LabelledImages, transform: Callable[[Any], Tensor]) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(self.images[index][0])
