"""The checks of a stream. Each raises Fault."""

from __future__ import annotations

import functools
import hashlib
import inspect
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image

from mulki_plugins.registry.guard import cause_of, guarded
from mulki_plugins.streams.task import LabelledImages, Task, TaskStream
from mulki_plugins.testing.subject import Fault, Subject
from mulki_plugins.testing.trial import Place, kept_random_state, train
from mulki_plugins.testing.world import small_model

LOOKED_AT = 200
"""Images of a split that are decoded; they lie evenly over it."""


class Library:
    """A stream, built once for all checks that look at it."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.printed = ""

    @functools.cached_property
    def stream(self) -> TaskStream:
        return self.made()

    def made(self) -> TaskStream:
        outcome = guarded(self.subject.made)
        self.printed = self.printed or outcome.printed
        if outcome.cause:
            raise Fault(
                f"it cannot be made: {outcome.cause}", "mend the error, or give the check the options that it needs"
            )
        stream: TaskStream = outcome.value
        return stream

    def splits(self) -> Iterator[tuple[Task, str, LabelledImages]]:
        for task in self.stream.tasks:
            yield task, f"{task.name}, train", task.train
            yield task, f"{task.name}, test", task.test


def made(library: Library) -> None:
    stream = library.stream
    if not isinstance(stream, TaskStream):
        what = f"it returns a {type(stream).__name__}"
        raise Fault(what, "return a mulki_plugins.streams.TaskStream of Tasks")
    if not stream.tasks or not all(isinstance(task, Task) for task in stream.tasks):
        raise Fault("it has no task, or something else among its tasks", "give it a tuple of at least one Task")
    for _, where, images in library.splits():
        if not len(images):
            raise Fault(f"{where}: there are no images", "give every task images to train and to test")


def names(library: Library) -> None:
    said = [task.name for task in library.stream.tasks]
    if twice := sorted({name for name in said if said.count(name) > 1}):
        raise Fault(f"two tasks are called {twice[0]!r}", "give every task a name of its own")
    for task in library.stream.tasks:
        if not isinstance(task.name, str) or not task.name.strip():
            raise Fault(f"a task is called {task.name!r}", "give every task a name")
        classes = list(task.class_names)
        if (
            isinstance(task.class_names, str)
            or not classes
            or not all(isinstance(c, str) and c.strip() for c in classes)
        ):
            raise Fault(f"{task.name}: a class has no name", "name every class in words, since the model reads them")
        if twice := sorted({c for c in classes if classes.count(c) > 1}):
            raise Fault(
                f"{task.name}: two classes are called {twice[0]!r}", "no model can tell them apart; name them otherwise"
            )
        if isinstance(task.templates, str) or not task.templates or not all("{}" in t for t in task.templates):
            what = f"{task.name}: a template has no {{}}, or there is none"
            raise Fault(what, 'give at least one, such as ("a photo of a {}.",)')


def declared(library: Library) -> None:
    said, there = list(library.subject.declared("tasks")), [task.name for task in library.stream.tasks]
    if said and not set(there) <= set(said):
        unknown = sorted(set(there) - set(said))
        raise Fault(
            f"it has the task {unknown[0]!r}, and is registered with {', '.join(said)}", "register it with tasks=[...]"
        )


def labels(library: Library) -> None:
    for task, where, images in library.splits():
        targets = list(images.targets)
        if len(targets) != len(images):
            raise Fault(f"{where}: {len(targets)} targets for {len(images)} images", "give a target for each image")
        for i, target in enumerate(targets):
            if (
                isinstance(target, bool)
                or not isinstance(target, int | np.integer)
                or not 0 <= target < len(task.class_names)
            ):
                what = f"{where}: target {i} is {target!r}, expected a number from 0 to {len(task.class_names) - 1}"
                raise Fault(what, "number the classes of every task from 0, in the order of class_names")
        for i in _some(images):
            if int(images[i][1]) != int(targets[i]):
                what = f"{where}: image {i} comes with class {images[i][1]}, its target is {targets[i]}"
                raise Fault(what, "keep `targets` and the images in one order")
        if absent := [name for c, name in enumerate(task.class_names) if c not in set(map(int, targets))]:
            raise Fault(
                f"{where}: there is no image of {absent[0]!r}",
                "give every class images, or leave it out of class_names",
            )


def images(library: Library) -> None:
    transform = small_model().transform(train=False)
    for _, where, split in library.splits():
        for i in _some(split):
            try:
                picture = split[i][0]
                transform(picture)
            except Exception as error:
                raise Fault(f"{where}: image {i} cannot be read: {cause_of(error)}", "return a PIL image") from error
            if not isinstance(picture, Image.Image):
                what = f"{where}: image {i} is a {type(picture).__name__}"
                raise Fault(what, "return a PIL image, and leave the transform to the model")


def separate(library: Library) -> None:
    for task in library.stream.tasks:
        seen = {_digest(task.train, i): i for i in range(min(len(task.train), 20 * LOOKED_AT))}
        for i in _some(task.test):
            if (j := seen.get(_digest(task.test, i))) is not None:
                what = f"{task.name}: test image {i} is training image {j}"
                raise Fault(what, "hold test images out, or what is measured is memory")


def repeatable(library: Library) -> None:
    again = library.made()
    if [task.name for task in again.tasks] != [task.name for task in library.stream.tasks]:
        raise Fault("made twice, its tasks are in another order", "sort what you read from a folder or a set")
    for a, b in zip(library.stream.tasks, again.tasks, strict=True):
        for split in ("train", "test"):
            one, other = getattr(a, split), getattr(b, split)
            same = len(one) == len(other) and list(one.targets) == list(other.targets)
            if not same or any(_digest(one, i) != _digest(other, i) for i in _some(one)):
                what = f"{a.name}, {split}: made twice, it has other images"
                raise Fault(what, "draw with a generator of a fixed seed, such as numpy.random.default_rng(0)")


def workers(library: Library) -> None:
    for _, where, split in library.splits():
        try:
            pickle.dumps(split)
        except Exception as error:
            what = f"{where}: it cannot be handed to another process (train.workers): {cause_of(error)}"
            raise Fault(what, "keep no open files, lambdas or locks in it") from error


def quiet(library: Library) -> None:
    _ = library.stream
    if library.printed:
        what = f"it prints: {library.printed!r}"
        raise Fault(what, "say nothing, or say it by the logging module; stdout is for results")


def trains(library: Library) -> None:
    stream = library.stream
    place = Place(stream=stream, iterations=2)
    with kept_random_state():
        try:
            benchmark = place.benchmark()
            trial = place.trial([])
            train(trial, benchmark, range(len(stream.tasks)))
        except Exception as error:
            raise Fault(
                f"a model cannot be trained on it: {cause_of(error)}", "mend what the checks before this one say"
            ) from error


def _some(split: LabelledImages) -> list[int]:
    """Places spread evenly over a split."""
    count = min(len(split), LOOKED_AT)
    return [i * len(split) // count for i in range(count)]


def _digest(split: LabelledImages, i: int) -> bytes:
    picture: Any = split[i][0]
    return hashlib.sha256(np.asarray(picture).tobytes()).digest()


CHECKS: dict[str, Callable[[Library], None]] = {
    name: function
    for name, function in list(globals().items())
    if inspect.isfunction(function) and list(inspect.signature(function).parameters) == ["library"]
}
