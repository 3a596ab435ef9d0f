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

from mulki_plugins.registry.guard import cause_of, try_call
from mulki_plugins.streams.check import StreamFault, stream_faults
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

    @functools.cached_property
    def faults(self) -> list[StreamFault]:
        return list(stream_faults(self.stream))

    def made(self) -> TaskStream:
        outcome = try_call(self.subject.made)
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


def raise_first(library: Library, check: str, /) -> None:
    """Fault for the first of what a run would refuse or warn of, and the kit reports under this check."""
    for fault in library.faults:
        if fault.check == check:
            raise Fault(fault.wrong, fault.mend)


def made(library: Library) -> None:
    stream = library.stream
    if not isinstance(stream, TaskStream):
        what = f"it returns a {type(stream).__name__}"
        raise Fault(what, "return a mulki_plugins.streams.TaskStream of Tasks")
    raise_first(library, "made")


def names(library: Library) -> None:
    raise_first(library, "names")


def declared(library: Library) -> None:
    said, there = list(library.subject.declared("tasks")), [task.name for task in library.stream.tasks]
    if said and not set(there) <= set(said):
        unknown = sorted(set(there) - set(said))
        raise Fault(
            f"it has the task {unknown[0]!r}, and is registered with {', '.join(said)}", "register it with tasks=[...]"
        )


def labels(library: Library) -> None:
    raise_first(library, "labels")
    for _, where, images in library.splits():
        targets = images.targets
        for i in _some(images):
            if int(images[i][1]) != int(targets[i]):
                what = f"{where}: image {i} comes with class {images[i][1]}, its target is {targets[i]}"
                raise Fault(what, "keep `targets` and the images in one order")


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
    raise_first(library, "separate")
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
