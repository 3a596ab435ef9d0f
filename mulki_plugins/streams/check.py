"""Faults of a stream that would give wrong numbers, found without decoding an image. Runs and the kit share them."""

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
from mulki_plugins.streams.images import open_picture
from mulki_plugins.streams.names import LONGEST, class_key, is_task_name, is_template, task_key
from mulki_plugins.streams.task import ArrayImages, LabelledImages, Task, TaskStream

MOST_COMPARED = 20_000
"""Copies are not searched for in a task with more image files: a run would start too slowly."""
_END = 2**16
"""Bytes read at each end of a file to compare it with others."""


@frozen
class StreamFault:
    """One fault, and how the stream's author can fix it."""

    check: Literal["made", "names", "labels", "separate"]
    """The kit's check that reports it."""
    problem: str
    fix: str
    fatal: bool = True
    """Whether a run refuses the stream; otherwise it warns."""


def check_stream(stream: TaskStream, who: str, *, reference: bool = False) -> tuple[str, ...]:
    """Warnings about a stream. Mistakes, all at once, if numbers on it would be wrong.

    who: the stream and its package, for messages. reference: only its training images and sentences are used.
    """
    faults = list(stream_faults(stream, reference=reference))
    if fatal := [f"{who}: {fault.problem}; {fault.fix}" for fault in faults if fault.fatal]:
        raise Mistakes(fatal)
    return tuple(f"{who}: {fault.problem}; {fault.fix}" for fault in faults)


def stream_faults(stream: TaskStream, *, reference: bool = False) -> Iterator[StreamFault]:
    """All faults, task by task."""
    tasks = stream.tasks
    if not isinstance(tasks, (tuple, list)) or not tasks or not all(isinstance(task, Task) for task in tasks):
        what = "it has no task, or something else among its tasks"
        yield StreamFault("made", what, "give it a tuple of at least one Task")
        return
    yield from _check_task_names(tasks)
    for task in tasks:
        yield from _check_class_names(task, reference)
        yield from _check_templates(task)
        parts = {"train": task.train} if reference else {"train": task.train, "test": task.test}
        faults = [fault for part, images in parts.items() for fault in _check_images(task, part, images, reference)]
        yield from faults
        if not reference and not any(fault.fatal for fault in faults):
            yield from _check_overlap(task, copies=getattr(task.train, "opener", None) is open_picture)


def _check_task_names(tasks: Sequence[Task]) -> Iterator[StreamFault]:
    seen: set[str] = set()
    for task in tasks:
        name = task.name
        if not isinstance(name, str) or not name.strip():
            yield StreamFault("names", f"a task is called {name!r}", "give every task a name")
            continue
        if not is_task_name(name):
            what = f"a task is called {format_value(name)}"
            mend = f"a task's name is one line of up to {LONGEST} characters without '/', '\\' or spaces around it"
            yield StreamFault("names", what, mend)
        key = task_key(name)
        if key in seen:
            mend = "give every task a name of its own, since accuracies are stored by name"
            yield StreamFault("names", f"two tasks are called {name!r}", mend)
        seen.add(key)


def _check_class_names(task: Task, reference: bool) -> Iterator[StreamFault]:
    """Two classes with the same name do no harm in reference data."""
    names = _items(task.class_names)
    if not names:
        yield StreamFault("names", f"{task.name}: it has no classes", "give it a tuple of class names")
        return
    if nameless := [name for name in names if not isinstance(name, str) or not name.strip()]:
        what = f"{task.name}: a class has no name, but {nameless[0]!r}"
        yield StreamFault("names", what, "name every class in words, since the model reads them")
        return
    if reference:
        return
    first: dict[str, str] = {}
    for name in names:
        other = first.setdefault(class_key(name), name)
        if other is not name or names.count(name) > 1:
            what = f"two classes are called {name!r}" if other == name else f"{other!r} and {name!r} read the same"
            yield StreamFault("names", f"{task.name}: {what}", "no model can tell them apart; rename one")
            return


def _check_templates(task: Task) -> Iterator[StreamFault]:
    templates = _items(task.templates)
    if not templates:
        what = f"{task.name}: a template has no {{}}, or there is none"
        yield StreamFault("names", what, 'give at least one, such as ("a photo of a {}.",)')
    for template in templates:
        if not isinstance(template, str) or "{}" not in template:
            what = f"{task.name}: a template has no {{}} in the class name's place: {format_value(template)}"
            yield StreamFault("names", what, "write {} there, as in 'a photo of a {}.'")
        elif not is_template(template):
            what = f"{task.name}: in a template only {{}} is replaced, and {format_value(template)} has other braces"
            yield StreamFault("names", what, "write {} in the class name's place, as in 'a photo of a {}.'")


def _items(value: Any) -> list[Any]:
    """The items of a sequence; none for a text, or for a value that is not a sequence."""
    return [] if isinstance(value, str) or not isinstance(value, Iterable) else list(value)


def _check_images(task: Task, part: str, images: LabelledImages, reference: bool) -> Iterator[StreamFault]:
    where = f"{task.name}, {part}"
    try:
        count = len(images)
        given = images.targets
        targets = np.asarray(given)
    except Exception as error:  # third-party code
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
        yield StreamFault("labels", what, "give one target per image, the number of its class")
        return
    classes = len(names)
    if (wrong := _first_invalid(targets, given, classes)) is not None:
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


def _first_invalid(targets: NDArray[Any], given: Sequence[int], classes: int) -> int | None:
    """Index of the first target that is not a class number."""
    if targets.dtype.kind in "iu":
        invalid = (targets < 0) | (targets >= classes)
        if not invalid.any() and isinstance(given, (list, tuple)) and bool in set(map(type, given)):
            invalid = np.array([isinstance(target, bool) for target in given])
    else:  # booleans, fractions, texts
        invalid = np.array(
            [type(t) is bool or not isinstance(t, int | np.integer) or not 0 <= t < classes for t in given]
        )
    return int(np.argmax(invalid)) if invalid.any() else None


def _check_overlap(task: Task, *, copies: bool) -> Iterator[StreamFault]:
    """Test images that are training images too: the same pixels in memory, or the same file.

    copies: compare the contents of files too. Published data sets hold copies, which their users cannot change.
    """
    shared: list[str] = []
    if isinstance(task.train, ArrayImages) and isinstance(task.test, ArrayImages):
        seen = {_digest(pixels) for pixels in task.train.images}
        shared = [f"test image {i}" for i, pixels in enumerate(task.test.images) if _digest(pixels) in seen]
    elif callable(getattr(task.train, "path", None)) and callable(getattr(task.test, "path", None)):
        shared = _shared_files(task.train, task.test, copies)
    if shared:
        count = "1 test image is" if len(shared) == 1 else f"{len(shared):,} test images are"
        what = f"{task.name}: {count} among the training images too, such as {shared[0]}"
        yield StreamFault("separate", what, "hold test images out of training, or you measure memory", fatal=False)


def _digest(pixels: NDArray[Any]) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(pixels).tobytes(), digest_size=16).digest()


def _shared_files(train: Any, test: Any, copies: bool) -> list[str]:
    """Test files that are training files: the same path or, in a small data set, the same file or a copy of it."""
    paths = [[str(images.path(i)) for i in range(len(images))] for images in (train, test)]
    known = set(paths[0])
    if len(paths[0]) + len(paths[1]) > MOST_COMPARED:
        return [path for path in paths[1] if path in known]
    stats = [[_status(path) for path in part] for part in paths]
    files = {(s.st_dev, s.st_ino) for s in stats[0] if s and s.st_ino}
    sizes = [{s.st_size for s in part if s} if copies else set() for part in stats]
    common = (sizes[0] & sizes[1]) - {0}
    contents = {_ends(path) for path, s in zip(paths[0], stats[0], strict=True) if s and s.st_size in common}
    return [
        path
        for path, s in zip(paths[1], stats[1], strict=True)
        if path in known or (s and ((s.st_dev, s.st_ino) in files or (s.st_size in common and _ends(path) in contents)))
    ]


def _status(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError:  # reported when the image is read
        return None


def _ends(path: str) -> bytes:
    """A fingerprint of a file's size and its first and last 64 KiB, or of its path if it cannot be read."""
    try:
        with open(path, "rb") as file:
            head = file.read(_END)
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _END))
            return hashlib.blake2b(b"%d:" % size + head + file.read(), digest_size=16).digest()
    except OSError:
        return os.fsencode(path)
