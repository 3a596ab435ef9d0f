"""The stream `split`: one data set's classes in steps, each of which is a task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from attrs import evolve
from numpy.typing import NDArray

from mulki_plugins.errors import MulkiError, did_you_mean, format_value
from mulki_plugins.streams.nested import IN_SPLIT, build_nested
from mulki_plugins.streams.selection import select_images
from mulki_plugins.streams.task import LabelledImages, Task, TaskStream
from mulki_plugins.types import Count, Natural


def split(
    *, of: Any, increment: Count, base: Natural = 0, class_order: Natural | list[str] | None = 1993
) -> TaskStream:
    """Class-incremental learning: one data set's classes in steps, each of which is a task (B-m Inc-n).

    The steps are called after the data set, `CIFAR100-01` and so on, and keep its templates. The last one takes the classes
    that are left. A seed s orders the classes by `numpy.random.RandomState(s).permutation` over the data set's own order,
    as class-incremental learning has it (iCaRL, arXiv 1611.07725, with seed 1993). MulkiError if `of` has not exactly one
    task, if the first step would take more classes than there are, or if a listed class does not exist.

    Args:
        of: A stream of one task, a name or {name, options}, such as {name: mtil, tasks: [CIFAR100]}.
        increment: Classes of each step (n).
        base: Classes of the first step (m); 0 for as many as the others.
        class_order: A seed, the names of all classes in their order, or null for the data set's own order.
    """
    whole = build_nested(of, ("of",), refused=IN_SPLIT)
    if len(whole.tasks) != 1:
        names = ", ".join(task.name for task in whole.tasks)
        raise MulkiError(
            f"split: expected a stream of one task, and {whole.name} has {len(whole.tasks)}: {names}",
            f"name one with `tasks: [{whole.tasks[0].name}]`" if whole.tasks else "",
        )
    [task] = whole.tasks
    if base > len(task.class_names):
        raise MulkiError(
            f"split: base: {task.name} has {len(task.class_names)} classes, and the first step takes {base}"
        )
    order = order_classes(task.class_names, class_order)
    sizes = step_sizes(len(order), base, increment)
    digits = len(str(len(sizes)))
    ends = np.cumsum(sizes)
    steps = [
        _step(task, f"{task.name}-{i:0{digits}d}", order[end - size : end])
        for i, (size, end) in enumerate(zip(sizes, ends.tolist(), strict=True), 1)
    ]
    return evolve(whole, name="split", tasks=tuple(steps))


def step_sizes(classes: int, base: int, increment: int) -> list[int]:
    """The number of classes of each step, in all `classes`: base (or increment, if base is 0), then increment each."""
    sizes = [min(base or increment, classes)]
    while (left := classes - sum(sizes)) > 0:
        sizes.append(min(increment, left))
    return sizes


def order_classes(names: Sequence[str], order: int | Sequence[str] | None) -> NDArray[np.int64]:
    """The indices of the classes in the order of learning. MulkiError unless a list names each class exactly once."""
    if order is None:
        return np.arange(len(names))
    if isinstance(order, int):
        return np.random.RandomState(order).permutation(len(names)).astype(np.int64)
    known = {name: i for i, name in enumerate(names)}
    for name in order:
        if name not in known:
            raise MulkiError(
                f"split: class_order: there is no class {format_value(name)} ({did_you_mean(name, known)})"
            )
    if missing := [name for name in names if name not in order]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise MulkiError(f"split: class_order: expected all {len(names)} classes, without {missing[0]!r}{more}")
    return np.array([known[name] for name in order], dtype=np.int64)


def _step(task: Task, name: str, classes: NDArray[np.int64]) -> Task:
    """The task with these classes only, numbered from 0 in this order."""
    return evolve(
        task,
        name=name,
        class_names=tuple(task.class_names[c] for c in classes),
        train=of_classes(task.train, classes, len(task.class_names)),
        test=of_classes(task.test, classes, len(task.class_names)),
    )


def of_classes(images: LabelledImages, chosen: NDArray[np.int64], classes: int) -> LabelledImages:
    """The images of the chosen ones of so many classes, in their order, labelled by the position of their class."""
    places = np.full(classes, -1, dtype=np.int64)
    places[chosen] = np.arange(len(chosen))
    labels = places[np.asarray(images.targets, dtype=np.int64)]
    indices = np.flatnonzero(labels >= 0)
    return select_images(images, indices, labels[indices])
