"""What is wrong with a stream that would give wrong numbers; no image is decoded. A run and the kit use the same code."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from mulki_plugins.errors import Mistakes, format_value
from mulki_plugins.registry.guard import cause_of
from mulki_plugins.streams.folders.names import LONGEST, has_one_place, names_a_task, same_task, told_apart
from mulki_plugins.streams.folders.stream import FolderImages
from mulki_plugins.streams.task import ArrayImages, LabelledImages, Task, TaskStream

COMPARED = 20_000
"""A task with more image files is not searched for copies, which would take too long at a run's start."""
_ENDS = 2**16


@frozen
class StreamFault:
    """One fault, and how its author mends it."""

    check: Literal["made", "names", "labels", "separate"]
    """The kit's check that reports it."""
    wrong: str
    mend: str
    fatal: bool = True
    """Whether a run is refused; otherwise it is warned."""


def check_stream(stream: TaskStream, who: str, *, reference: bool = False) -> tuple[str, ...]:
    """Warnings. Mistakes, all at once, where numbers on the stream would be wrong.

    who: the stream and its package, for messages. reference: only its training images and sentences are used.
    """
    faults = list(stream_faults(stream, reference=reference))
    if fatal := [f"{who}: {fault.wrong}; {fault.mend}" for fault in faults if fault.fatal]:
        raise Mistakes(fatal)
    return tuple(f"{who}: {fault.wrong}; {fault.mend}" for fault in faults)


def stream_faults(stream: TaskStream, *, reference: bool = False) -> Iterator[StreamFault]:
    """All faults, task by task."""
    tasks = stream.tasks
    if not isinstance(tasks, (tuple, list)) or not tasks or not all(isinstance(task, Task) for task in tasks):
        what = "it has no task, or something else among its tasks"
        yield StreamFault("made", what, "give it a tuple of at least one Task")
        return
    yield from _task_names(tasks)
    for task in tasks:
        yield from _texts(task, reference)
        parts = {"train": task.train} if reference else {"train": task.train, "test": task.test}
        faults = [fault for part, images in parts.items() for fault in _images(task, part, images, reference)]
        yield from faults
        if not reference and not any(fault.fatal for fault in faults):
            yield from _separate(task)


def _task_names(tasks: Sequence[Task]) -> Iterator[StreamFault]:
    seen: set[str] = set()
    for task in tasks:
        name = task.name
        if not isinstance(name, str) or not name.strip():
            yield StreamFault("names", f"a task is called {name!r}", "give every task a name")
            continue
        if not names_a_task(name):
            what = f"a task is called {format_value(name)}"
            mend = f"a task's name is one line of up to {LONGEST} characters without '/', '\\' or spaces around it"
            yield StreamFault("names", what, mend)
        same = same_task(name)
        if same in seen:
            mend = "give every task a name of its own, since accuracies are kept by name"
            yield StreamFault("names", f"two tasks are called {name!r}", mend)
        seen.add(same)


def _texts(task: Task, reference: bool) -> Iterator[StreamFault]:
    """Class names and templates. Two classes of one name do no harm in reference data."""
    names = _items(task.class_names)
    if not names:
        mend = "give it a tuple of class names"
        yield StreamFault("names", f"{task.name}: it has no classes", mend)
    elif nameless := [name for name in names if not isinstance(name, str) or not name.strip()]:
        mend = "name every class in words, since the model reads them"
        yield StreamFault("names", f"{task.name}: a class has no name, but {nameless[0]!r}", mend)
    elif not reference:
        first: dict[str, str] = {}
        for name in names:
            other = first.setdefault(told_apart(name), name)
            if other is not name or names.count(name) > 1:
                what = f"two classes are called {name!r}" if other == name else f"{other!r} and {name!r} read the same"
                mend = "no model can tell them apart; name them otherwise"
                yield StreamFault("names", f"{task.name}: {what}", mend)
                break
    templates = _items(task.templates)
    if not templates:
        what = f"{task.name}: a template has no {{}}, or there is none"
        yield StreamFault("names", what, 'give at least one, such as ("a photo of a {}.",)')
        return
    for template in templates:
        if not isinstance(template, str) or "{}" not in template:
            what = f"{task.name}: a template has no {{}} in the class name's place: {format_value(template)}"
            yield StreamFault("names", what, "write {} there, as in 'a photo of a {}.'")
        elif not has_one_place(template):
            what = f"{task.name}: in a template only {{}} is replaced, and {format_value(template)} has other braces"
            yield StreamFault("names", what, "write {} in the class name's place, as in 'a photo of a {}.'")


def _items(value: Any) -> list[Any]:
    """A sequence's items; none where it is one text, or no sequence."""
    return [] if isinstance(value, str) or not isinstance(value, Iterable) else list(value)


def _images(task: Task, part: str, images: LabelledImages, reference: bool) -> Iterator[StreamFault]:
    where = f"{task.name}, {part}"
    try:
        count = len(images)
        given = images.targets
        targets = np.asarray(given)
    except Exception as error:  # of code that is not ours
        what = f"{where}: its images and targets cannot be counted: {cause_of(error)}"
        yield StreamFault("made", what, "give it images with `len` and `targets`")
        return
    if not count:
        yield StreamFault("made", f"{where}: there are no images", "give every task images to train and to test")
        return
    names = _items(task.class_names)
    if reference or not names:
        return
    if targets.ndim != 1 or len(targets) != count:
        size = len(targets) if targets.ndim else "no"
        what = f"{where}: {size} targets for {count} images"
        if targets.ndim > 1:
            what = f"{where}: its targets have {targets.ndim} dimensions"
        yield StreamFault("labels", what, "give a target for each image, its class's number")
        return
    classes = len(names)
    if (wrong := _first_wrong(targets, given, classes)) is not None:
        target: Any = given[wrong]
        target = target.item() if hasattr(target, "item") else target
        what = f"{where}: target {wrong} is {target!r}, expected a number from 0 to {classes - 1}"
        yield StreamFault("labels", what, "number the classes of every task from 0, in the order of class_names")
        return
    absent = np.flatnonzero(np.bincount(targets.astype(np.int64), minlength=classes) == 0)
    if len(absent):
        more = f" and {len(absent) - 1:,} other classes" if len(absent) > 1 else ""
        what = f"{where}: there is no image of {names[absent[0]]!r}{more}"
        mend = "give every class images, or leave it out of class_names"
        yield StreamFault("labels", what, mend, fatal=False)


def _first_wrong(targets: NDArray[Any], given: Sequence[int], classes: int) -> int | None:
    """The place of the first target that is no class's number."""
    if targets.dtype.kind in "iu":
        wrong = (targets < 0) | (targets >= classes)
        if not wrong.any() and isinstance(given, (list, tuple)) and bool in set(map(type, given)):
            wrong = np.array([isinstance(target, bool) for target in given])
    else:  # booleans, fractions, texts
        wrong = np.array(
            [type(t) is bool or not isinstance(t, int | np.integer) or not 0 <= t < classes for t in given]
        )
    return int(np.argmax(wrong)) if wrong.any() else None


def _separate(task: Task) -> Iterator[StreamFault]:
    """Test images that are training images too: the same pixels in memory, the same file, or a copy of it."""
    shared: list[str] = []
    if isinstance(task.train, ArrayImages) and isinstance(task.test, ArrayImages):
        seen = {_digest(pixels) for pixels in task.train.images}
        shared = [f"test image {i}" for i, pixels in enumerate(task.test.images) if _digest(pixels) in seen]
    elif callable(getattr(task.train, "path", None)) and callable(getattr(task.test, "path", None)):
        shared = _shared_files(task.train, task.test)
    if shared:
        some = "1 test image is" if len(shared) == 1 else f"{len(shared):,} test images are"
        what = f"{task.name}: {some} among the training images too, such as {shared[0]}"
        yield StreamFault("separate", what, "hold test images out, or what is measured is memory", fatal=False)


def _digest(pixels: NDArray[Any]) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(pixels).tobytes(), digest_size=16).digest()


def _shared_files(train: Any, test: Any) -> list[str]:
    """The test files that are training files: by path, and, of not too many, by the file itself; copies only of `folders`."""
    paths = [[str(images.path(i)) for i in range(len(images))] for images in (train, test)]
    known = set(paths[0])
    if len(paths[0]) + len(paths[1]) > COMPARED:
        return [path for path in paths[1] if path in known]
    stats = [[_status(path) for path in part] for part in paths]
    files = {(s.st_dev, s.st_ino) for s in stats[0] if s and s.st_ino}
    copies = isinstance(train, FolderImages) and isinstance(test, FolderImages)
    sizes = [{s.st_size for s in part if s} if copies else set() for part in stats]
    both = (sizes[0] & sizes[1]) - {0}
    contents = {_ends(path) for path, s in zip(paths[0], stats[0], strict=True) if s and s.st_size in both}
    return [
        path
        for path, s in zip(paths[1], stats[1], strict=True)
        if path in known or (s and ((s.st_dev, s.st_ino) in files or (s.st_size in both and _ends(path) in contents)))
    ]


def _status(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError:  # such a file is reported when it is read
        return None


def _ends(path: str) -> bytes:
    """A fingerprint of a file's size and its first and last 64 KiB; of one that cannot be read the path's own."""
    try:
        with open(path, "rb") as file:
            head = file.read(_ENDS)
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _ENDS))
            return hashlib.blake2b(b"%d:" % size + head + file.read(), digest_size=16).digest()
    except OSError:
        return os.fsencode(path)
