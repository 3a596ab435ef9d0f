"""What a recipe says of its folders, checked against what lies in them; imports neither torch nor numpy."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import islice
from typing import Annotated, Any

from attrs import frozen

from mulki_plugins.errors import MulkiError, did_you_mean, plain
from mulki_plugins.options import Natural, OptionError, Range, convert, mistakes_of, shown
from mulki_plugins.streams.folders.names import readable_names, same_names
from mulki_plugins.streams.folders.scan import class_folders, holds_images, images_below, same_name

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
        if isinstance(name, str) and name in seen:
            wrong.append(OptionError(f"the task {shown(name)} is named twice", ("tasks", i, "name")))
        if isinstance(name, str):
            seen.add(name)
        try:
            task: FolderTask = convert(said, FolderTask)
        except Exception as error:
            spoilt = list(mistakes_of(error, ("tasks", i)))
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
            found[key] = _classes_in(path, 2 if key == "images" else 1)
        except MulkiError as error:
            yield OptionError(error.message, (key,))
    if wrong or len(found) < len(task.folders):
        return
    if "train" in found and "test" in found:
        yield from _agreement(task, found["train"], found["test"])
    if found:
        yield from named(next(iter(found.values())), task.class_names, next(iter(found)))[1]


def _texts(task: FolderTask) -> Iterator[OptionError]:
    if not task.name.strip() or task.name != task.name.strip() or plain(task.name) != task.name or "/" in task.name:
        what = "expected a text without '/', line ends or spaces around it"
        yield OptionError(f"{what}, got {shown(task.name)}", ("name",))
    if task.templates == []:
        yield OptionError("expected at least one template, such as 'a photo of a {}.'", ("templates",))
    for i, template in enumerate(task.templates or ()):
        if "{}" not in template:
            message = f"expected '{{}}' in the class name's place, as in 'a photo of a {{}}.', got {shown(template)}"
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


def _classes_in(path: str, least: int) -> list[str]:
    """The class folders in a folder, each with at least so many images. MulkiError that says what is missing."""
    if not os.path.isdir(path):
        what = "no such folder"
        if os.path.exists(path):
            what = "this is a file, expected a folder with a folder for each class"
        elif path and not os.path.isabs(path):
            what += f" (a path begins in the current folder, {os.getcwd()})"
        raise MulkiError(f"{path!r}: {what}")
    classes = class_folders(path)
    if not classes:
        lie = "images lie in it, but no folder" if holds_images(path) else "there is no folder in it"
        raise MulkiError(f"{path}: {lie}; expected a folder for each class, with its images")
    if parts := _parts(path, classes):
        raise MulkiError(f"{path}: its folders {_listed(parts)} are parts, no classes; give `train` and `test` in it")
    problems = []
    few = {name: len(list(islice(images_below(os.path.join(path, name)), least))) for name in classes}
    if empty := [name for name in classes if few[name] == 0]:
        problems.append(f"no image (.jpg, .png and the like) lies in {_listed(empty)}; fill it, or remove it")
    if single := [name for name in classes if 0 < few[name] < least]:
        problems.append(f"one image alone lies in {_listed(single)}, and train and test need one each")
    if problems:
        raise MulkiError(f"{path}: {'; '.join(problems)}")
    return classes


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
        known = {same_name(name) for name in there}
        if lone := [name for name in here if same_name(name) not in known]:
            missing = [name for name in there if same_name(name) not in {same_name(n) for n in here}]
            hint = did_you_mean(lone[0], missing) if missing else ""
            hint = f" ({hint})" if hint.startswith("did") else ""
            which = f"folder {_listed(lone)}{hint} is" if len(lone) == 1 else f"folders {_listed(lone)}{hint} are"
            message = f"{task.folders[key]}: the class {which} not in `{other}`"
            yield OptionError(f"{message}, {task.folders[other]}", (key,))


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
        elif plain(name) != name:
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
    return plain(f"{some} and {len(names) - 8} more" if len(names) > 8 else some)
