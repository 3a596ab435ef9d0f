"""The stream `folders`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from attrs import frozen
from PIL import Image

from mulki_plugins.errors import Mistakes
from mulki_plugins.streams.folders.declared import FolderTask, check_tasks, named, passed_over
from mulki_plugins.streams.folders.picture import open_picture
from mulki_plugins.streams.folders.scan import class_folders, counterparts, images_below
from mulki_plugins.streams.folders.split import split
from mulki_plugins.streams.task import Task, TaskStream
from mulki_plugins.types import convert

TEMPLATES = ["a photo of a {}."]
SHARE, SEED = 0.2, 0
"""What counts where a task says nothing."""


@frozen(eq=False)
class FolderImages:
    """Image files and their class indices; a file is opened when it is asked for."""

    root: str
    files: Sequence[str]
    """Paths from the root, with `/`."""
    targets: Sequence[int]

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> str:
        return os.path.join(self.root, self.files[index])

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """The picture in RGB; MulkiError, which names the file, where it cannot be read."""
        return open_picture(self.path(index)), self.targets[index]


def folders(*, tasks: list[Any]) -> TaskStream:
    """The user's own images: each task `{name, train, test, class_names, templates}`, or `{name, images, test_share, seed}`.

    train, test: folders with a folder of images for each class, the same in both. images: one such folder, of which each
    class's `test_share` (0.2) is held out for the test, chosen by `seed` (0). Relative paths begin in the current folder,
    `~` is the user's. Images may lie deeper in a class folder; other files, names with a leading dot, and what systems leave
    behind are passed over. leave_out: names of folders beside the classes that are no classes. class_names: a list in the
    order of the sorted folder names, or a mapping from folder to name; without, the folder names made readable. templates:
    `a photo of a {}.` without. Mistakes, all at once, where something is wrong.

    Args:
        tasks: A list of {name, train, test} or {name, images}, with class_names, templates and leave_out.
    """
    if wrong := check_tasks(tasks):
        raise Mistakes([f"folders: {_written(error.path)}: {error.message}" for error in wrong])
    notices = tuple(f"note: {line}" for line in passed_over(tasks))
    built = tuple(_task(convert(task, FolderTask)) for task in tasks)
    return TaskStream(name="folders", tasks=built, notices=notices)


def _written(path: Sequence[str | int]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def _task(declared: FolderTask) -> Task:
    roots = declared.folders
    classes = class_folders(roots.get("images") or roots["train"], declared.leave_out or ())
    if "images" in roots:
        share = SHARE if declared.test_share is None else declared.test_share
        train, test = _parted(roots["images"], classes, share, declared.seed or SEED)
    else:
        train, test = (_labelled(roots[key], _by_class(roots[key], classes)) for key in ("train", "test"))
    names, _ = named(classes, declared.class_names, "")
    templates = tuple(declared.templates or TEMPLATES)
    return Task(name=declared.name, class_names=tuple(names), templates=templates, train=train, test=test)


def _by_class(root: str, classes: Sequence[str]) -> list[list[str]]:
    """The image files of each class, sorted; a class folder may be spelt with its accents apart, or in another case."""
    spelt = counterparts(classes, class_folders(root))
    folders = [spelt[name] for name in classes]
    return [sorted(f"{name}/{file}" for file in images_below(os.path.join(root, name))) for name in folders]


def _parted(root: str, classes: Sequence[str], share: float, seed: int) -> tuple[FolderImages, FolderImages]:
    parts = [split(files, share, seed) for files in _by_class(root, classes)]
    return _labelled(root, [train for train, _ in parts]), _labelled(root, [test for _, test in parts])


def _labelled(root: str, by_class: Sequence[Sequence[str]]) -> FolderImages:
    """Class after class, each file with its class's place."""
    files = [file for found in by_class for file in found]
    return FolderImages(root, files, [label for label, found in enumerate(by_class) for _ in found])
