"""The checks of a stream. Each raises Fault. Those named after a StreamFault also report what a run would refuse or warn of."""

from __future__ import annotations

import functools
import hashlib
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from mulki_plugins.registry.guard import cause_of, try_call
from mulki_plugins.streams.check import StreamFault, stream_faults
from mulki_plugins.streams.task import LabelledImages, Task, TaskStream
from mulki_plugins.testing.process import preserved_state
from mulki_plugins.testing.small import small_model
from mulki_plugins.testing.subject import Fault, Subject
from mulki_plugins.testing.trial import Setup, train

SAMPLES = 200
"""How many images of a split are decoded."""


class Library:
    """A stream under test, created once for all checks."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.printed = ""

    @functools.cached_property
    def stream(self) -> TaskStream:
        return self.create()

    @functools.cached_property
    def faults(self) -> list[StreamFault]:
        return list(stream_faults(self.stream))

    def create(self) -> TaskStream:
        outcome = try_call(self.subject.create)
        self.printed = self.printed or outcome.printed
        if outcome.cause:
            raise Fault(outcome.cause, "fix the error, or pass the check the options that the stream needs")
        stream: TaskStream = outcome.value
        return stream

    def splits(self) -> Iterator[tuple[Task, str, LabelledImages]]:
        for task in self.stream.tasks:
            yield task, f"{task.name}, train", task.train
            yield task, f"{task.name}, test", task.test


def raise_first(library: Library, check: str, /) -> None:
    """Fault for the first problem that a run would refuse or warn of and that belongs to this check."""
    for fault in library.faults:
        if fault.check == check:
            raise Fault(fault.problem, fault.fix)


def made(library: Library) -> None:
    stream = library.stream
    if not isinstance(stream, TaskStream):
        problem = f"it returns a {type(stream).__name__}"
        raise Fault(problem, "return a mulki_plugins.streams.TaskStream of Tasks")
    raise_first(library, "made")


def names(library: Library) -> None:
    raise_first(library, "names")


def declared(library: Library) -> None:
    declared, actual = list(library.subject.declared("tasks")), [task.name for task in library.stream.tasks]
    if declared and not set(actual) <= set(declared):
        unknown = sorted(set(actual) - set(declared))
        raise Fault(
            f"it has the task {unknown[0]!r}, but is registered with {', '.join(declared)}",
            "register it with tasks=[...]",
        )


def labels(library: Library) -> None:
    raise_first(library, "labels")
    for _, where, images in library.splits():
        targets = images.targets
        for i in _sample(images):
            if int(images[i][1]) != int(targets[i]):
                problem = f"{where}: image {i} comes with class {images[i][1]}, its target is {targets[i]}"
                raise Fault(problem, "keep `targets` and the images in one order")


def images(library: Library) -> None:
    transform = small_model().transform(train=False)
    for _, where, split in library.splits():
        for i in _sample(split):
            try:
                picture = split[i][0]
                transform(picture)
            except Exception as error:
                raise Fault(f"{where}: image {i} cannot be read: {cause_of(error)}", "return a PIL image") from error
            if not isinstance(picture, Image.Image):
                problem = f"{where}: image {i} is a {type(picture).__name__}"
                raise Fault(problem, "return a PIL image, and leave the transform to the model")


def separate(library: Library) -> None:
    raise_first(library, "separate")
    for task in library.stream.tasks:
        seen = {_digest(task.train, i): i for i in range(min(len(task.train), 20 * SAMPLES))}
        for i in _sample(task.test):
            if (j := seen.get(_digest(task.test, i))) is not None:
                problem = f"{task.name}: test image {i} is training image {j}"
                raise Fault(problem, "hold test images out; otherwise the accuracy measures memory")


def repeatable(library: Library) -> None:
    again = library.create()
    if [task.name for task in again.tasks] != [task.name for task in library.stream.tasks]:
        raise Fault("created twice, its tasks are in another order", "sort what you read from a folder or a set")
    for a, b in zip(library.stream.tasks, again.tasks, strict=True):
        for split in ("train", "test"):
            one, other = getattr(a, split), getattr(b, split)
            same = len(one) == len(other) and list(one.targets) == list(other.targets)
            if not same or any(_digest(one, i) != _digest(other, i) for i in _sample(one)):
                problem = f"{a.name}, {split}: created twice, it has other images"
                raise Fault(problem, "draw with a generator of a fixed seed, such as numpy.random.default_rng(0)")


def workers(library: Library) -> None:
    for _, where, split in library.splits():
        try:
            pickle.dumps(split)
        except Exception as error:
            problem = f"{where}: it cannot be sent to another process (train.workers): {cause_of(error)}"
            raise Fault(problem, "keep no open files, lambdas or locks in it") from error


def quiet(library: Library) -> None:
    _ = library.stream
    if library.printed:
        problem = f"it prints: {library.printed!r}"
        raise Fault(problem, "print nothing, or use the logging module; stdout is for results")


def trains(library: Library) -> None:
    stream = library.stream
    setup = Setup(stream=stream, iterations=2)
    with preserved_state():
        try:
            benchmark = setup.benchmark()
            trial = setup.trial([])
            train(trial, benchmark, range(len(stream.tasks)))
        except Exception as error:
            raise Fault(
                f"a model cannot train on it: {cause_of(error)}", "fix what the earlier checks report"
            ) from error


def _sample(split: LabelledImages) -> list[int]:
    """Indices spread evenly over a split."""
    count = min(len(split), SAMPLES)
    return [i * len(split) // count for i in range(count)]


def _digest(split: LabelledImages, i: int) -> bytes:
    picture: Any = split[i][0]
    return hashlib.sha256(np.asarray(picture).tobytes()).digest()
