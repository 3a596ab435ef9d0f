"""The stream `folders`."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from typing import Any

from mulki_plugins.errors import Mistakes
from mulki_plugins.recipe.yaml import format_path
from mulki_plugins.streams.folders.classes import class_folders, images_below, match_folders
from mulki_plugins.streams.folders.tasks import FolderTask, check_tasks, classes_of, texts_of, unused_files
from mulki_plugins.streams.images import FileImages, open_picture
from mulki_plugins.streams.split import split_by_hash
from mulki_plugins.streams.task import Task, TaskStream
from mulki_plugins.types import convert

TEST_SHARE, SEED = 0.2, 0
"""Defaults of a task."""


def folders(*, tasks: list[Any]) -> TaskStream:
    """The user's own images, in one folder per class.

    Keys of a task: train, test: folders with one folder of images per class, the same classes in both. images: one such
    folder; `test_share` (0.2) of each class is held out for the test, selected by `seed` (0). leave_out: names of folders
    beside the classes that are not classes. class_names: a list in the order of the sorted folder names, or a mapping from
    folder to name; by default the folder names, made readable. templates: by default `a photo of a {}.`. licence: of the
    images, for the card of an exported model.

    Relative paths start in the current folder, `~` is the user's home. Images may lie deeper in a class folder; other
    files, names with a leading dot, and files that systems leave behind are ignored. Mistakes, all at once, if something
    is wrong.

    Args:
        tasks: A list of {name, train, test} or {name, images}, with class_names, templates and leave_out.
    """
    if mistakes := check_tasks(tasks):
        raise Mistakes([f"folders: {format_path(mistake.path)[2:]}: {mistake.message}" for mistake in mistakes])
    notices = tuple(f"note: {line}" for line in unused_files(tasks))
    return TaskStream(
        name="folders", tasks=tuple(_build_task(convert(task, FolderTask)) for task in tasks), notices=notices
    )


def _build_task(declared: FolderTask) -> Task:
    roots, classes, leave_out = declared.folders, classes_of(declared), declared.leave_out or ()
    if "images" in roots:
        share = TEST_SHARE if declared.test_share is None else declared.test_share
        by_class = [
            split_by_hash(files, share, declared.seed or SEED) for files in _files(roots["images"], classes, leave_out)
        ]
        train, test = (_label(roots["images"], [files[part] for files in by_class]) for part in (0, 1))
    else:
        train, test = (_label(roots[key], _files(roots[key], classes, leave_out)) for key in ("train", "test"))
    texts = texts_of(declared, classes)
    return Task(
        name=texts.name,
        class_names=texts.class_names,
        templates=texts.templates,
        train=train,
        test=test,
        licence=declared.licence or "",
    )


def _files(root: str, classes: Sequence[str], leave_out: Collection[str]) -> list[list[str]]:
    """The image files of each class, sorted; a class folder may encode accents differently, or be in another case."""
    spelling = match_folders(classes, class_folders(root, leave_out))
    folders = [spelling[name] for name in classes]
    return [sorted(f"{name}/{file}" for file in images_below(os.path.join(root, name))) for name in folders]


def _label(root: str, by_class: Sequence[Sequence[str]]) -> FileImages:
    """Class after class; a file's label is the index of its class."""
    files = [file for files in by_class for file in files]
    return FileImages.of(root, files, [label for label, files in enumerate(by_class) for _ in files], open_picture)
