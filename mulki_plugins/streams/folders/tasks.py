"""A recipe's tasks of folders, and every mistake in them and in the folders; imports neither torch nor numpy."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Annotated, Any

from attrs import frozen

from mulki_plugins.characters import printable
from mulki_plugins.errors import MulkiError, OptionError, did_you_mean, format_value
from mulki_plugins.recipe.emit import dump_inline
from mulki_plugins.streams.entries import describe_others, is_picture, is_system
from mulki_plugins.streams.folders.classes import (
    all_folders,
    class_folders,
    files_in,
    holds_images,
    images_below,
    match_folders,
    others_below,
    readable_names,
    same_spelling,
)
from mulki_plugins.streams.names import LONGEST, group_same_names, is_task_name, is_template, task_key
from mulki_plugins.types import Natural, Range, collect_mistakes, convert

Share = Annotated[float, Range(above=0, below=1)]

TEMPLATES = ["a photo of a {}."]
"""Default templates."""
TRAIN = ("train", "training")
TEST = ("test", "testing", "val", "valid", "validation")
"""Names of folders that hold a split of a data set, not a class; the first of several is used."""


@frozen(kw_only=True)
class FolderTask:
    """One task: `train` and `test`, each with one folder per class, or `images`, which is split into both."""

    name: str
    train: str | None = None
    test: str | None = None
    images: str | None = None
    test_share: Share | None = None
    """Share of each class of `images` that is held out for the test; 0.2 by default."""
    seed: Natural | None = None
    """Selects the images that are held out; 0 by default."""
    class_names: list[str] | dict[str, str] | None = None
    """All names in the order of the sorted folder names, or some by folder name."""
    templates: list[str] | None = None
    """Sentences with `{}` in the class name's place."""
    leave_out: list[str] | None = None
    """Folders beside the classes that are not classes, such as `annotations`."""
    licence: str | None = None
    """The licence of the images, for the card of an exported model."""

    @property
    def folders(self) -> dict[str, str]:
        """The folders of the task by key, with `~` expanded."""
        paths = {"train": self.train, "test": self.test, "images": self.images}
        return {key: os.path.expanduser(path) for key, path in paths.items() if path is not None}


@frozen
class TaskTexts:
    """What a model reads of a task."""

    name: str
    class_names: tuple[str, ...]
    templates: tuple[str, ...]


def read_texts(tasks: Iterable[Any]) -> list[TaskTexts]:
    """The texts of valid tasks."""
    declared: list[FolderTask] = [convert(task, FolderTask) for task in tasks]
    return [texts_of(task, classes_of(task)) for task in declared]


def classes_of(task: FolderTask) -> list[str]:
    """The names of a valid task's class folders, sorted."""
    return class_folders(task.folders.get("images") or task.folders["train"], task.leave_out or ())


def texts_of(task: FolderTask, classes: Sequence[str]) -> TaskTexts:
    """The texts of a valid task with these class folders."""
    names, _ = name_classes(classes, task.class_names, "")
    return TaskTexts(task.name, tuple(names), tuple(task.templates or TEMPLATES))


def check_options(options: Mapping[str, Any]) -> list[OptionError]:
    """All mistakes in a recipe's `tasks` and in the folders they name."""
    return check_tasks(options.get("tasks"))


def check_tasks(tasks: Any) -> list[OptionError]:
    """All mistakes in a list of tasks; their paths start with `tasks`."""
    if not isinstance(tasks, (list, tuple)) or not tasks:
        return [OptionError("expected at least one task, such as `- {name: birds, images: data/birds}`", ("tasks",))]
    mistakes: list[OptionError] = []
    seen: set[str] = set()
    for i, value in enumerate(tasks):
        name = value.get("name") if isinstance(value, Mapping) else None
        if isinstance(name, str) and task_key(name) in seen:
            mistakes.append(OptionError(f"the task {format_value(name)} is named twice", ("tasks", i, "name")))
        if isinstance(name, str):
            seen.add(task_key(name))
        try:
            task: FolderTask = convert(value, FolderTask)
        except Exception as error:
            invalid = list(collect_mistakes(error, ("tasks", i)))
            others = _check_valid_keys(value, {e.path[2] for e in invalid if len(e.path) > 2})
            mistakes += [*invalid, *(e.below(("tasks", i)) for e in others)]
        else:
            mistakes += [e.below(("tasks", i)) for e in _check_task(task)]
    return mistakes


def _check_valid_keys(value: Any, invalid: Collection[str | int]) -> list[OptionError]:
    """Mistakes in the remaining keys of a task whose other keys are invalid; none if it cannot be read without those."""
    try:
        task: FolderTask = convert({key: item for key, item in value.items() if key not in invalid}, FolderTask)
    except Exception:
        return []
    return [*_check_texts(task), *_check_folders(task, classes=True)]


def _check_task(task: FolderTask) -> Iterator[OptionError]:
    yield from _check_texts(task)
    mistakes = list(_check_keys(task))
    yield from mistakes
    yield from _check_folders(task, classes=not mistakes)


def _check_texts(task: FolderTask) -> Iterator[OptionError]:
    """Mistakes in the task's name and templates."""
    if not is_task_name(task.name):
        what = f"expected a text without '/', '\\', line ends or spaces around it, of up to {LONGEST} characters"
        yield OptionError(f"{what}, got {format_value(task.name)}", ("name",))
    if task.templates == []:
        yield OptionError("expected at least one template, such as 'a photo of a {}.'", ("templates",))
    for i, template in enumerate(task.templates or ()):
        if not is_template(template):
            message = (
                f"expected '{{}}' in the class name's place, as in 'a photo of a {{}}.', got {format_value(template)}"
            )
            yield OptionError(message, ("templates", i))


def _check_keys(task: FolderTask) -> Iterator[OptionError]:
    """Exactly `train` and `test` are allowed, or `images` with the options of its split."""
    if not task.folders:
        yield OptionError("names no folder: give `train` and `test`, or `images` to hold out a share of one folder", ())
    elif task.images is not None:
        for key in ("train", "test"):
            if getattr(task, key) is not None:
                message = "stands beside `images`, which is split into train and test; give one or the other"
                yield OptionError(message, (key,))
    else:
        for key, other in (("train", "test"), ("test", "train")):
            if getattr(task, key) is None:
                hint = "; to hold out a share of one folder, write `images` in place of `train`" * (key == "test")
                yield OptionError(f"missing, beside `{other}`{hint}", (key,))
        for key in ("test_share", "seed"):
            if getattr(task, key) is not None:
                yield OptionError("is an option of `images`, but `train` and `test` are given", (key,))


def _check_folders(task: FolderTask, *, classes: bool) -> Iterator[OptionError]:
    """Mistakes in the folders and, if there are none, in the classes (unless `classes` is false)."""
    classes_by_key: dict[str, list[str]] = {}
    for key, path in task.folders.items():
        try:
            classes_by_key[key] = _list_classes(path, 2 if key == "images" else 1, task.leave_out or ())
        except MulkiError as error:
            yield OptionError(error.message, (key,))
    if not classes or len(classes_by_key) < len(task.folders):
        return
    yield from _check_leave_out(task)
    if "train" in classes_by_key and "test" in classes_by_key:
        yield from _compare_parts(task, classes_by_key["train"], classes_by_key["test"])
    for key, names in list(classes_by_key.items())[:1]:
        yield from name_classes(names, task.class_names, key)[1]


def _check_leave_out(task: FolderTask) -> Iterator[OptionError]:
    """Names in `leave_out` that no folder has."""
    folders = [name for path in task.folders.values() for name in all_folders(path)]
    known = {same_spelling(name) for name in folders}
    for i, name in enumerate(task.leave_out or ()):
        if same_spelling(name) not in known:
            hint = did_you_mean(name, set(folders))
            yield OptionError(f"there is no folder {format_value(name)} beside the classes ({hint})", ("leave_out", i))


def _list_classes(path: str, least: int, leave_out: Collection[str] = ()) -> list[str]:
    """The class folders in a folder. MulkiError unless there are some, each with at least `least` images."""
    if not os.path.isdir(path):
        what = "no such folder"
        if os.path.exists(path):
            what = "this is a file, expected a folder with one folder per class"
        elif path and not os.path.isabs(path):
            what += f" (a path begins in the current folder, {os.getcwd()})"
        raise MulkiError(f"{path!r}: {what}")
    classes = class_folders(path, leave_out)
    if not classes:
        what = "images lie in it, but no folder" if holds_images(path) else "there is no folder in it"
        if class_folders(path):
            what = "`leave_out` leaves no folder in it"
        raise MulkiError(f"{path}: {what}; expected one folder per class, with its images")
    if splits := _list_splits(path, classes):
        raise MulkiError(
            f"{path}: its folders {quote_names(splits)} are splits, not classes; give `train` and `test` in it"
        )
    count = {name: len(list(islice(images_below(os.path.join(path, name)), least))) for name in classes}
    empty = [name for name in classes if count[name] == 0]
    single = [name for name in classes if 0 < count[name] < least]
    problems = []
    if empty:
        problems.append(
            f"no image (.jpg, .png and the like) lies in {quote_names(empty)}{_describe_files(path, empty)}"
        )
    if single:
        problems.append(f"only one image lies in {quote_names(single)}, but train and test need one each")
    if problems:
        it = "it" if len(empty + single) == 1 else "them"
        hint = f"fill {it}, or leave {it} out of the classes with {_leaving_out([*leave_out, *empty, *single])}"
        raise MulkiError(f"{path}: {'; '.join(problems)}; {hint}")
    return classes


def _describe_files(path: str, folders: Sequence[str]) -> str:
    """The other files in folders without an image, for a message."""
    files = (f"{name}/{file}" for name in folders for file in others_below(os.path.join(path, name)))
    first = list(islice(files, 10_000))
    return f", but {describe_others(first)}" if first else ""


def _leaving_out(names: Sequence[str]) -> str:
    """The option, as YAML, that leaves these folders out of the classes."""
    return printable(f"leave_out: {dump_inline(list(dict.fromkeys(names)))}")


def _list_splits(path: str, classes: Sequence[str]) -> list[str]:
    """The split folders (`train`, `test`) if `path` holds splits rather than classes, else an empty list."""
    splits = [name for name in classes if name.lower() in (*TRAIN, *TEST)]
    all_splits = len(splits) == len(classes) and any(class_folders(os.path.join(path, name)) for name in splits)
    return splits if all_splits else []


def _compare_parts(task: FolderTask, train: Sequence[str], test: Sequence[str]) -> Iterator[OptionError]:
    """Classes that only one of `train` and `test` has; one folder given for both."""
    if os.path.realpath(task.folders["train"]) == os.path.realpath(task.folders["test"]):
        message = "this is the folder of `train`; to hold out a share of one folder, write `images` in place of both"
        yield OptionError(message, ("test",))
    for key, names, others, other in (("train", train, test, "test"), ("test", test, train, "train")):
        matches, back = match_folders(names, others), match_folders(others, names)
        if lone := [name for name in names if name not in matches]:
            missing = [name for name in others if name not in back]
            hint = did_you_mean(lone[0], missing) if missing else ""
            hint = f" ({hint})" if hint.startswith("did") else ""
            which = (
                f"folder {quote_names(lone)}{hint} is" if len(lone) == 1 else f"folders {quote_names(lone)}{hint} are"
            )
            message = f"{task.folders[key]}: the class {which} not in `{other}`, {task.folders[other]}"
            advice = f"add or rename, or leave out with {_leaving_out([*(task.leave_out or ()), *lone])}"
            yield OptionError(f"{message}; {advice}", (key,))


def name_classes(
    folders: Sequence[str], given: list[str] | dict[str, str] | None, where: str
) -> tuple[list[str], list[OptionError]]:
    """The class names of sorted class folders, and all mistakes in them.

    given: the option `class_names`. where: the option that has the folders, for mistakes in names nobody wrote.
    """
    names, mistakes = list(readable_names(folders)), []
    path: tuple[str | int, ...] = ("class_names",) if given is not None else (where,)
    if isinstance(given, list):
        if len(given) != len(folders):
            what = (
                f"expected {len(folders)} names, in the order of the folders {quote_names(folders)}, got {len(given)}"
            )
            return names, [OptionError(what, path)]
        names = list(given)
    for folder, name in given.items() if isinstance(given, dict) else ():
        indices = [i for i, known in enumerate(folders) if same_spelling(known) == same_spelling(folder)]
        if not indices:
            hint = did_you_mean(folder, folders)
            mistakes.append(OptionError(f"there is no such class folder ({hint})", (*path, folder)))
        for i in indices:
            names[i] = name
    for folder, name in zip(folders, names, strict=True):
        if not name.strip():
            mistakes.append(OptionError(f"the name of the class folder {folder!r} is empty; {_advise([folder])}", path))
        elif printable(name) != name and isinstance(given, dict) and name in given.values():
            what = f"the name of the class folder {folder!r} must be one line without control characters, got {name!r}"
            mistakes.append(OptionError(what, path))
        elif printable(name) != name:
            what = "is not valid text; rename it, or give the names of all classes as a list in class_names"
            mistakes.append(OptionError(f"the name of the class folder {folder!r} {what}", path))
    for name, same in group_same_names(folders, names):
        if name.strip():
            message = f"the class folders {quote_names(same)} get the same name, {name!r}"
            mistakes.append(OptionError(f"{message}; {_advise(same)}", path))
    return names, mistakes


def _advise(folders: Sequence[str]) -> str:
    return f"give a better name in class_names: {{{', '.join(f'{folder!r}: ...' for folder in folders[:4])}}}"


def unused_files(tasks: Iterable[Any]) -> list[str]:
    """The files and folders of valid tasks that are ignored, one line per kind."""
    declared: list[FolderTask] = [convert(task, FolderTask) for task in tasks]
    return [line for task in declared for path in task.folders.values() for line in _unused(path, task.leave_out or ())]


def _unused(root: str, leave_out: Collection[str]) -> Iterator[str]:
    if hidden := [name for name in all_folders(root) if is_system(name)]:
        yield f"{root}: ignored, since hidden or made by the system: {quote_names(hidden)}"
    if beside := [name for name in files_in(root) if is_picture(name)]:
        yield f"{root}: ignored, since in no class folder: {_count(beside, 'image')} (such as {beside[0]})"
    folders = class_folders(root, leave_out)
    if others := [f"{name}/{file}" for name in folders for file in others_below(os.path.join(root, name))]:
        yield f"{root}: ignored, since Pillow cannot read them: {_count(others, 'file')}: {describe_others(others)}"


def _count(files: Sequence[str], what: str) -> str:
    return f"{len(files):,} {what}{'' if len(files) == 1 else 's'}"


def quote_names(names: Sequence[str]) -> str:
    first = ", ".join(repr(name) for name in names[:8])
    return printable(f"{first} and {len(names) - 8} more" if len(names) > 8 else first)
