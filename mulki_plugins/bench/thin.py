"""A stream with few test images, so that an evaluation takes seconds; chosen by how fast the model is on this machine."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from attrs import define, evolve, frozen

from mulki_plugins.models.classifier import ClipClassifier
from mulki_plugins.recipe.schema import Recipe
from mulki_plugins.streams.images import FileImages
from mulki_plugins.streams.task import LabelledImages, TaskStream

SECONDS = 10.0
"""How long an evaluation of the thinned stream may take, roughly."""
DECODING = 0.008
"""Seconds to decode and resize one photograph, roughly."""
LEAST = 4
"""Images of a batch at least."""


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


@define
class Thinned:
    """Called by `build` with the stream and the model; takes evenly spaced test images of each task."""

    recipe: Recipe
    eval_batch_size: int = 0
    """For the evaluations of the thinned stream: smaller than the recipe's on a slow machine."""
    _whole: TaskStream | None = None

    @property
    def whole(self) -> TaskStream:
        """The stream with all its images."""
        assert self._whole is not None
        return self._whole

    def __call__(self, stream: TaskStream, model: ClipClassifier, image_size: int) -> TaskStream:
        self._whole = stream
        seconds = seconds_per_image(model, image_size)
        files = any(isinstance(task.test, FileImages) for task in stream.tasks)
        if files:
            seconds = max(seconds, DECODING / max(1, _workers(self.recipe)))
        self.eval_batch_size, images = batch_and_images(
            seconds, len(stream.tasks), self.recipe.evaluate.batch_size, _workers(self.recipe)
        )
        return evolve(stream, tasks=tuple(evolve(task, test=some(task.test, images)) for task in stream.tasks))


def batch_and_images(seconds: float, tasks: int, batch_size: int, workers: int) -> tuple[int, int]:
    """The batch size and the number of images of each task for an evaluation of about SECONDS.

    seconds: per image. With workers at least two batches for each, since the first ones arrive together.
    """
    images = int(SECONDS / tasks / max(seconds, 1e-9))
    batches = 2 + 2 * workers
    batch = max(LEAST, min(batch_size, images // batches))
    return batch, max(images, 2 * batch)


def some(images: LabelledImages, count: int) -> LabelledImages:
    """Evenly spaced images, in order; all of them if there are no more than `count`."""
    if len(images) <= count:
        return images
    indices = np.linspace(0, len(images) - 1, count).astype(np.int64)
    if isinstance(images, FileImages):
        return images.take(indices)
    return SomeImages(images, indices.tolist())


@torch.no_grad()
def seconds_per_image(model: ClipClassifier, image_size: int, batch: int = 16) -> float:
    """How long the model takes to encode an image, from a few batches."""
    device = model.scale.device
    x = torch.zeros(batch, 3, image_size, image_size, device=device)
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        float(model.encode_image(x).sum())  # a number on the host, so that the device has finished
        best = min(best, (time.perf_counter() - began) / batch)
        if best * batch > 1:
            break
    return best


def _workers(recipe: Recipe) -> int:
    return recipe.train.workers if isinstance(recipe.train.workers, int) else 0
