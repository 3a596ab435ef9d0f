"""A stream with few test images and a recipe with few steps, which take seconds; chosen by how fast the model is here.

Where the sentences of all classes alone would take long, only the first two tasks are evaluated, with some of their templates.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from attrs import define, evolve

from mulki_plugins.models.classifier import ClipClassifier
from mulki_plugins.models.precision import autocast
from mulki_plugins.recipe.schema import Recipe, TaskBudget
from mulki_plugins.streams.images import FileImages
from mulki_plugins.streams.task import LabelledImages, SomeImages, Task, TaskStream
from mulki_plugins.training.build import choose_workers

SECONDS = 10.0
"""How long an evaluation of the thinned stream may take, roughly."""
LEAST = 4
"""Images of a batch at least."""
STEP = 8.0
"""How long a step of training may take, roughly; on a slow machine smaller batches are measured."""
PASSES = 5
"""A step costs about as much as this many passes of its images: the student's, two for gradients, one for each teacher."""


@define
class Thinned:
    """Called by `build` with the stream and the model; takes evenly spaced test images of each task."""

    recipe: Recipe
    eval_batch_size: int = 0
    """For the evaluations of the thinned stream: smaller than the recipe's on a slow machine."""
    train_batch_size: int = 0
    """For the steps: smaller than the recipe's on a slow machine."""
    sentence: float = 0.0
    """Seconds to encode a sentence."""
    _whole: TaskStream | None = None

    @property
    def whole(self) -> TaskStream:
        """The stream with all its images."""
        assert self._whole is not None
        return self._whole

    def __call__(self, stream: TaskStream, model: ClipClassifier, image_size: int) -> TaskStream:
        self._whole = stream
        tests = {task.name: len(task.test) for task in stream.tasks}
        with autocast(self.recipe.train.precision, model.scale.device):
            seconds = seconds_per_image(model, image_size)
            self.sentence = seconds_per_sentence(model)
        self.train_batch_size = affordable_batch(seconds, self.recipe.train.batch_size)
        tasks = stream.tasks
        if self.recipe.evaluate.classes != "all" and sum(sentences_of(stream).values()) * self.sentence > SECONDS:
            tasks = tasks[:2]
            tasks = tuple(evolve(task, templates=self._affordable(task)) for task in tasks)
            model.use_prompts((*tasks, *stream.tasks[2:]))
            tests = {task.name: tests[task.name] for task in tasks}
        workers = choose_workers(self.recipe.train.workers, stream, image_size)
        self.eval_batch_size, counts = sample_sizes(seconds, tests, self.recipe.evaluate.batch_size, workers)
        some_of = tuple(evolve(task, test=some(task.test, counts[task.name])) for task in tasks)
        return evolve(stream, tasks=some_of, held_out=())  # few images, which an estimate does without

    def _affordable(self, task: Task) -> tuple[str, ...]:
        """The first templates of a task, so many that its classes take SECONDS / 5."""
        return tuple(task.templates[: max(1, int(SECONDS / 5 / self.sentence / len(task.class_names)))])


def with_own_cache(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with an empty cache of decoded images, which the first evaluation fills as in a first run."""
    if recipe.evaluate.cache == "off":
        return recipe
    return evolve(recipe, evaluate=evolve(recipe.evaluate, cache=str(folder)))


def shortened(recipe: Recipe, steps: int, thinned: Thinned) -> Recipe:
    """The recipe with a task of few steps, and on a slow machine with small batches and without a compiler."""
    train = evolve(
        recipe.train,
        iterations=3 * steps + 10,  # the observer ends the task; the schedule only needs a length
        epochs=None,
        per_task={name: TaskBudget(lr=budget.lr) for name, budget in recipe.train.per_task.items()},
        checkpoint=evolve(recipe.train.checkpoint, every=None),
        batch_size=thinned.train_batch_size,
        compile=recipe.train.compile and thinned.train_batch_size == recipe.train.batch_size,
    )
    return evolve(recipe, train=train, evaluate=evolve(recipe.evaluate, batch_size=thinned.eval_batch_size))


def sentences_of(stream: TaskStream) -> dict[str, int]:
    """The number of sentences of each task that an evaluation encodes."""
    return {task.name: len(task.class_names) * len(task.templates) for task in stream.tasks}


def affordable_batch(seconds: float, batch_size: int) -> int:
    """The largest batch up to `batch_size` whose step takes about STEP, at that many seconds per image."""
    return max(min(LEAST, batch_size), min(batch_size, int(STEP / max(PASSES * seconds, 1e-9))))


def sample_sizes(seconds: float, tests: dict[str, int], batch_size: int, workers: int) -> tuple[int, dict[str, int]]:
    """The batch size, and the number of images of each task, for an evaluation of about SECONDS.

    seconds: per image; tests: the number of test images of each task. A loader's workers fetch their first batches side by
    side and go on nearly in step, so batches come in bursts of one from each: a rate shows only over such a round, after
    several batches of each worker. The largest task gets them, the others two batches.
    """
    affordable = int(SECONDS / max(seconds, 1e-9))
    if not workers:
        images = affordable // len(tests)
        batch = max(LEAST, min(batch_size, images // 2))
        return batch, dict.fromkeys(tests, max(images, 2 * batch))
    enough = steady_after(workers) + max(2, workers)
    batch = max(LEAST, min(batch_size, affordable // (enough + 2 * len(tests))))
    largest = max(tests, key=tests.__getitem__)
    return batch, {**dict.fromkeys(tests, 2 * batch), largest: enough * batch}


def steady_after(workers: int) -> int:
    """The batches after which a loader with this many workers delivers at its own pace: each fetches two in advance."""
    return 3 * workers + 2 if workers else 1


def some(images: LabelledImages, count: int) -> LabelledImages:
    """Evenly spaced images, in order; all of them if there are no more than `count`."""
    if len(images) <= count:
        return images
    indices = np.linspace(0, len(images) - 1, count).astype(np.int64)
    if isinstance(images, FileImages):
        return images.take(indices)
    return SomeImages(images, indices.tolist())


@torch.no_grad()
def seconds_per_image(model: ClipClassifier, image_size: int, batch: int = 8) -> float:
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


@torch.no_grad()
def seconds_per_sentence(model: ClipClassifier) -> float:
    """How long the model takes to encode a sentence, from those of the first task's classes in one template."""
    best = float("inf")
    while True:
        began = time.perf_counter()
        features = model.encode_text(0, all_templates=False)
        float(features.sum())
        seconds = time.perf_counter() - began
        if seconds > 1 or best < float("inf"):
            return min(best, seconds) / len(features)
        best = seconds
