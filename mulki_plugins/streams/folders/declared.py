"""What a recipe says of its folders, checked against what lies in them; imports neither torch nor numpy."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Annotated, Any

from attrs import frozen

from mulki_plugins.characters import printable
from mulki_plugins.errors import MulkiError, OptionError, did_you_mean, format_value
from mulki_plugins.recipe.emit import dump_inline
from mulki_plugins.streams.entries import is_picture, is_system, kinds_of
from mulki_plugins.streams.folders.names import (
    LONGEST,
    has_one_place,
    names_a_task,
    readable_names,
    same_names,
    same_task,
)
from mulki_plugins.streams.folders.scan import (
    all_folders,
    class_folders,
    counterparts,
    files_in,
    holds_images,
    images_below,
    others_below,
    same_name,
)
from mulki_plugins.types import Natural, Range, collect_mistakes, convert

Share = Annotated[float, Range(above=0, below=1)]

TRAIN = ("train", "training")
TEST = ("test", "testing", "val", "valid", "validation")
"""Names of folders that hold a part of a data set, not a class; of several the first is taken."""


@frozen(kw_only=True)
class FolderTask:
    """One task: `train` and `test`, each with a folder for each class, or `images` with all, which are then parted."""

    name: str
    train: str | None = None
    test: str | None = None
    images: str | None = None
    test_share: Share | None = None
    """Of `images`, and of each class of them; 0.2 where nothing is said."""
    seed: Natural | None = None
    """Which images of a class are held out for the test; 0 where nothing is said."""
    class_names: list[str] | dict[str, str] | None = None
    """In the order of the sorted folder names, or by folder name, and then only of those that read badly."""
    templates: list[str] | None = None
    """Sentences with `{}` in the class name's place."""
    leave_out: list[str] | None = None
    """Folders beside the classes that are no classes, such as `annotations`."""

    @property
    def folders(self) -> dict[str, str]:
        """The folders that are given, by key, as paths of this machine."""
        said = {"train": self.train, "test": self.test, "images": self.images}
        return {key: os.path.expanduser(path) for key, path in said.items() if path is not None}


def check(options: Mapping[str, Any]) -> list[OptionError]:
    """Everything that is wrong with a recipe's `tasks`, and with the folders that they name."""
    return check_tasks(options.get("tasks"))


def check_tasks(tasks: Any) -> list[OptionError]:
    """The same for the list of tasks; paths begin with `tasks`."""
    if not isinstance(tasks, (list, tuple)) or not tasks:
        return [OptionError("expected at least one task, such as `- {name: birds, images: data/birds}`", ("tasks",))]
    wrong: list[OptionError] = []
    seen: set[str] = set()
    for i, said in enumerate(tasks):
        name = said.get("name") if isinstance(said, Mapping) else None
        if isinstance(name, str) and same_task(name) in seen:
            wrong.append(OptionError(f"the task {format_value(name)} is named twice", ("tasks", i, "name")))
        if isinstance(name, str):
            seen.add(same_task(name))
        try:
            task: FolderTask = convert(said, FolderTask)
        except Exception as error:
            spoilt = list(collect_mistakes(error, ("tasks", i)))
            problems = _of_the_rest(said, {e.path[2] for e in spoilt if len(e.path) > 2})
            wrong += [*spoilt, *(e.below(("tasks", i)) for e in problems)]
            continue
        wrong += [e.below(("tasks", i)) for e in _problems(task)]
    return wrong


def _of_the_rest(said: Any, spoilt: Collection[str | int]) -> list[OptionError]:
    """What else is wrong with a task of which some keys are; nothing where it is none without them."""
    try:
        task: FolderTask = convert({key: value for key, value in said.items() if key not in spoilt}, FolderTask)
    except Exception:
        return []
    return [*_texts(task), *_folders(task, [])]


def _problems(task: FolderTask) -> Iterator[OptionError]:
    yield from _texts(task)
    wrong = list(_keys(task))
    yield from wrong
    yield from _folders(task, wrong)


def _folders(task: FolderTask, wrong: list[OptionError]) -> Iterator[OptionError]:
    """What is wrong with the folders, and if nothing is, and nothing with the keys, with the classes in them."""
    found: dict[str, list[str]] = {}
    for key, path in task.folders.items():
        try:
            found[key] = _classes_in(path, 2 if key == "images" else 1, task.leave_out or ())
        except MulkiError as error:
            yield OptionError(error.message, (key,))
    if wrong or len(found) < len(task.folders):
        return
    yield from _left_out(task)
    if "train" in found and "test" in found:
        yield from _agreement(task, found["train"], found["test"])
    if found:
        yield from named(next(iter(found.values())), task.class_names, next(iter(found)))[1]


def _left_out(task: FolderTask) -> Iterator[OptionError]:
    """Names in `leave_out` of which there is no folder."""
    there = [name for path in task.folders.values() for name in all_folders(path)]
    known = {same_name(name) for name in there}
    for i, name in enumerate(task.leave_out or ()):
        if same_name(name) not in known:
            hint = did_you_mean(name, set(there))
            yield OptionError(f"there is no folder {format_value(name)} beside the classes ({hint})", ("leave_out", i))


def passed_over(tasks: Iterable[Any]) -> list[str]:
    """What lies in the folders of checked tasks and is not used, a line for each kind of it."""
    declared: list[FolderTask] = [convert(task, FolderTask) for task in tasks]
    return [line for task in declared for path in task.folders.values() for line in _unused(path, task.leave_out or ())]


def _unused(root: str, leave_out: Collection[str]) -> Iterator[str]:
    if hidden := [name for name in all_folders(root) if is_system(name)]:
        yield f"{root}: passed over, since hidden or made by the system: {_listed(hidden)}"
    if beside := [name for name in files_in(root) if is_picture(name)]:
        yield f"{root}: passed over, since in no class's folder: {_counted(beside, 'image')} (such as {beside[0]})"
    folders = class_folders(root, leave_out)
    if others := [f"{name}/{file}" for name in folders for file in others_below(os.path.join(root, name))]:
        yield f"{root}: passed over, since Pillow reads no image in them: {_counted(others, 'file')}: {kinds_of(others)}"


def _counted(files: Sequence[str], what: str) -> str:
    return f"{len(files):,} {what}{'' if len(files) == 1 else 's'}"


def _texts(task: FolderTask) -> Iterator[OptionError]:
    if not names_a_task(task.name):
        what = f"expected a text without '/', '\\', line ends or spaces around it, of up to {LONGEST} characters"
        yield OptionError(f"{what}, got {format_value(task.name)}", ("name",))
    if task.templates == []:
        yield OptionError("expected at least one template, such as 'a photo of a {}.'", ("templates",))
    for i, template in enumerate(task.templates or ()):
        if not has_one_place(template):
            message = (
                f"expected '{{}}' in the class name's place, as in 'a photo of a {{}}.', got {format_value(template)}"
            )
            yield OptionError(message, ("templates", i))


def _keys(task: FolderTask) -> Iterator[OptionError]:
    """Exactly `train` and `test`, or `images` with what says how they are parted."""
    if not task.folders:
        yield OptionError("names no folder: give `train` and `test`, or `images`, of which a share is held out", ())
    elif task.images is not None:
        for key in ("train", "test"):
            if getattr(task, key) is not None:
                message = "stands beside `images`, which is parted into train and test; give one or the other"
                yield OptionError(message, (key,))
    else:
        for key, other in (("train", "test"), ("test", "train")):
            if getattr(task, key) is None:
                hint = (
                    "" if key == "train" else "; to hold out a share of one folder, write `images` in place of `train`"
                )
                yield OptionError(f"missing, beside `{other}`{hint}", (key,))
        for key in ("test_share", "seed"):
            if getattr(task, key) is not None:
                yield OptionError("says how `images` are parted, and `train` and `test` are given here", (key,))


def _classes_in(path: str, least: int, leave_out: Collection[str] = ()) -> list[str]:
    """The class folders in a folder, each with at least so many images. MulkiError that says what is missing."""
    if not os.path.isdir(path):
        what = "no such folder"
        if os.path.exists(path):
            what = "this is a file, expected a folder with a folder for each class"
        elif path and not os.path.isabs(path):
            what += f" (a path begins in the current folder, {os.getcwd()})"
        raise MulkiError(f"{path!r}: {what}")
    classes = class_folders(path, leave_out)
    if not classes:
        lie = "images lie in it, but no folder" if holds_images(path) else "there is no folder in it"
        if class_folders(path):
            lie = "`leave_out` leaves no folder in it"
        raise MulkiError(f"{path}: {lie}; expected a folder for each class, with its images")
    if parts := _parts(path, classes):
        raise MulkiError(f"{path}: its folders {_listed(parts)} are parts, no classes; give `train` and `test` in it")
    problems = []
    few = {name: len(list(islice(images_below(os.path.join(path, name)), least))) for name in classes}
    if empty := [name for name in classes if few[name] == 0]:
        problems.append(f"no image (.jpg, .png and the like) lies in {_listed(empty)}{_other_files(path, empty)}")
    if single := [name for name in classes if 0 < few[name] < least]:
        problems.append(f"one image alone lies in {_listed(single)}, and train and test need one each")
    if problems:
        unfit = [*empty, *single]
        it = "it" if len(unfit) == 1 else "them"
        hint = f"fill {it}, or leave {it} out of the classes with {leaving_out([*leave_out, *unfit])}"
        raise MulkiError(f"{path}: {'; '.join(problems)}; {hint}")
    return classes


def _other_files(path: str, folders: Sequence[str]) -> str:
    """What lies in folders without an image, for an error; nothing where they are empty."""
    files = (f"{name}/{file}" for name in folders for file in others_below(os.path.join(path, name)))
    some = list(islice(files, 10_000))
    return f", but {kinds_of(some)}" if some else ""


def leaving_out(names: Sequence[str]) -> str:
    """What a task says in a recipe so that folders of these names are no classes of it."""
    return printable(f"leave_out: {dump_inline(list(dict.fromkeys(names)))}")


def _parts(path: str, classes: Sequence[str]) -> list[str]:
    """The folders of a folder that is a data set in parts, of which each has class folders; none where it has classes."""
    parts = [name for name in classes if name.lower() in (*TRAIN, *TEST)]
    of_parts = len(parts) == len(classes) and any(class_folders(os.path.join(path, name)) for name in parts)
    return parts if of_parts else []


def _agreement(task: FolderTask, train: Sequence[str], test: Sequence[str]) -> Iterator[OptionError]:
    if os.path.realpath(task.folders["train"]) == os.path.realpath(task.folders["test"]):
        message = "this is the folder of `train`; to hold out a share of one folder, write `images` in place of both"
        yield OptionError(message, ("test",))
    for key, here, there, other in (("train", train, test, "test"), ("test", test, train, "train")):
        matched, back = counterparts(here, there), counterparts(there, here)
        if lone := [name for name in here if name not in matched]:
            missing = [name for name in there if name not in back]
            hint = did_you_mean(lone[0], missing) if missing else ""
            hint = f" ({hint})" if hint.startswith("did") else ""
            which = f"folder {_listed(lone)}{hint} is" if len(lone) == 1 else f"folders {_listed(lone)}{hint} are"
            message = f"{task.folders[key]}: the class {which} not in `{other}`, {task.folders[other]}"
            advice = f"add or rename, or leave out with {leaving_out([*(task.leave_out or ()), *lone])}"
            yield OptionError(f"{message}; {advice}", (key,))


def named(
    folders: Sequence[str], given: list[str] | dict[str, str] | None, where: str
) -> tuple[list[str], list[OptionError]]:
    """The class names for these sorted folders, and what is wrong with them; where: the option that has the folders."""
    names, wrong = list(readable_names(folders)), []
    path: tuple[str | int, ...] = ("class_names",) if given is not None else (where,)
    if isinstance(given, list):
        if len(given) != len(folders):
            what = f"expected {len(folders)} names, in the order of the folders {_listed(folders)}, got {len(given)}"
            return names, [OptionError(what, path)]
        names = list(given)
    for folder, name in given.items() if isinstance(given, dict) else ():
        places = [i for i, known in enumerate(folders) if same_name(known) == same_name(folder)]
        if not places:
            wrong.append(
                OptionError(f"there is no such class folder ({did_you_mean(folder, folders)})", (*path, folder))
            )
        for place in places:
            names[place] = name
    for folder, name in zip(folders, names, strict=True):
        if not name.strip():
            wrong.append(OptionError(f"the name of the class folder {folder!r} is empty; {_advice([folder])}", path))
        elif printable(name) != name:
            what = "is no text; rename it, or give the names of all classes as a list in class_names"
            wrong.append(OptionError(f"the name of the class folder {folder!r} {what}", path))
    for name, same in same_names(folders, names):
        if name.strip():
            message = f"the class folders {_listed(same)} are told apart by their names, and both read {name!r}"
            wrong.append(OptionError(f"{message}; {_advice(same)}", path))
    return names, wrong


def _advice(folders: Sequence[str]) -> str:
    return f"write what it is in class_names: {{{', '.join(f'{folder!r}: ...' for folder in folders[:4])}}}"


def _listed(names: Sequence[str]) -> str:
    some = ", ".join(repr(name) for name in names[:8])
    return printable(f"{some} and {len(names) - 8} more" if len(names) > 8 else some)
