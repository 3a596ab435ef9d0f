"""A recipe for folders of images, as text to be read and changed; imports neither torch nor numpy."""

from __future__ import annotations

import os
import re
import shlex
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from attrs import define, field, frozen

from mulki_plugins.errors import Mistakes, MulkiError
from mulki_plugins.recipe.check import check_name
from mulki_plugins.recipe.emit import dump_inline
from mulki_plugins.recipe.yaml import MAX_BYTES
from mulki_plugins.streams.entries import is_picture
from mulki_plugins.streams.folders.classes import (
    class_folders,
    holds_images,
    images_below,
    match_folders,
    others_below,
    readable_names,
)
from mulki_plugins.streams.folders.tasks import TEST, TRAIN, check_tasks, quote_names, unused_files
from mulki_plugins.streams.names import group_same_names

MOST_NAMES = 2000
"""Class names are written out up to this number, and to half of a recipe's bytes; nobody reads a longer recipe."""
_DEEPEST = 4
"""Levels of nested folders that are searched for the classes."""


@frozen
class Draft:
    """A recipe's name, its lines, and notices for its user."""

    name: str
    lines: list[str]
    notices: list[str]

    def text(self, file: str) -> str:
        """The recipe as the content of a file of that name."""
        return "\n".join([*_HEAD.format(file=shlex.quote(file)).splitlines(), *self.lines]) + "\n"


@define
class _TaskDraft:
    """The options of one task, and notices about its folder."""

    options: dict[str, Any]
    notices: list[str] = field(factory=list)


def draft(folders: Sequence[str], name: str | None = None) -> Draft:
    """The recipe for these folders, one task each. Mistakes, for all folders at once, if one cannot be used."""
    if name is not None and (problem := check_name(name)):
        raise MulkiError(f"--name: {problem}")
    tasks = _draft_tasks(folders)
    name = name or _name_recipe([task.options["name"] for task in tasks])
    return Draft(name, list(_lines(name, tasks)), [notice for task in tasks for notice in task.notices])


def draft_options(folder: str) -> tuple[dict[str, Any], list[str]]:
    """A recipe's entry for one folder, and notices for its user. Mistakes if the folder cannot be used."""
    [task] = _draft_tasks([folder])
    return task.options, task.notices


def _draft_tasks(folders: Sequence[str]) -> list[_TaskDraft]:
    mistakes, tasks = [], []
    for folder, task_name in zip(folders, _name_tasks(folders), strict=True):
        try:
            tasks.append(_draft_task(folder, task_name))
            mistakes += [_prefix(folder, error.message) for error in check_tasks([tasks[-1].options])]
        except MulkiError as error:
            mistakes += error.lines()
    if mistakes:
        raise Mistakes(mistakes)
    return tasks


def _prefix(folder: str, message: str) -> str:
    """The message, starting with the folder."""
    return message if message.startswith(_tidy_path(folder)) else f"{folder}: {message}"


def _name_tasks(folders: Sequence[str]) -> list[str]:
    """A name for each task: its folder's, preceded by those of the parent folders where two are the same."""
    paths = [os.path.abspath(os.path.expanduser(folder)).rstrip(os.sep).split(os.sep) for folder in folders]
    names: list[str] = []
    for path in paths:
        depth = 1
        while depth < len(path) and any(other is not path and other[-depth:] == path[-depth:] for other in paths):
            depth += 1
        text = "-".join(part for part in path[-depth:] if part) or "images"
        base = name = _printable(text.replace("\\", "-"))[:100].strip()
        number = 2
        while name in names:
            name, number = f"{base}-{number}", number + 1
        names.append(name)
    return names


def _printable(text: str) -> str:
    printable = "".join(c if c.isprintable() and c != "/" else "-" for c in unicodedata.normalize("NFC", text))
    return printable.strip() or "images"


def _name_recipe(tasks: Sequence[str]) -> str:
    text = "-".join(tasks) if len(tasks) <= 3 else f"{tasks[0]}-and-{len(tasks) - 1}-more"
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9._-]+", "-", ascii_text).strip("-._")[:80] or "my-images"


def _draft_task(folder: str, name: str) -> _TaskDraft:
    path = _tidy_path(folder)
    if not os.path.isdir(_expand(path)):
        what = "this is a file, expected a folder" if os.path.exists(_expand(path)) else "no such folder"
        raise MulkiError(f"{folder}: {what}")
    task = _TaskDraft({"name": name})
    path = _descend(folder, path, task)
    inside = class_folders(_expand(path))
    splits = {name.lower(): name for name in reversed(inside) if _is_split(_expand(path), name)}
    train = next((splits[name] for name in TRAIN if name in splits), None)
    tests = [splits[name] for name in TEST if name in splits]
    if train and tests:
        task.options |= {"train": os.path.join(path, train), "test": os.path.join(path, tests[0])}
        if others := [name for name in inside if name not in (train, tests[0])]:
            unused = ", ".join(map(repr, others))
            task.notices.append(f"{folder}: uses {train} and {tests[0]}, but not {unused}")
    elif train or tests:
        only = train or tests[0]
        task.options |= {"images": os.path.join(path, only), "test_share": 0.2, "seed": 0}
        task.notices.append(f"{folder}: there is only {only!r}; a fifth of it is held out for the test")
        if others := [name for name in inside if name != only]:
            names = ", ".join(map(repr, others))
            task.notices.append(f"{folder}: {names}: not used, since {only!r} has the classes in it")
            if any(holds_images(os.path.join(_expand(path), name)) for name in others):
                task.notices.append(f"{folder}: if all of these are classes, set images to {path} in the recipe")
    else:
        task.options |= {"images": path, "test_share": 0.2, "seed": 0}
    _leave_out(folder, task)
    _name_classes(folder, task)
    task.notices += unused_files([task.options])
    return task


def _tidy_path(folder: str) -> str:
    """The path as typed, without redundant parts; a relative one stays relative."""
    short = os.path.normpath(folder)
    return folder if short.startswith("~") and not folder.startswith("~") else short


def _expand(path: str) -> str:
    return os.path.expanduser(path)


def _descend(folder: str, path: str, task: _TaskDraft) -> str:
    """The folder of the classes: this one, or the only one in it, as unpacking an archive often leaves it."""
    for _ in range(_DEEPEST):
        inside = [name for name in class_folders(_expand(path)) if _holds_any(os.path.join(_expand(path), name))]
        if len(inside) != 1 or _is_split(_expand(path), inside[0]):
            break
        deeper = os.path.join(path, inside[0])
        if holds_images(_expand(deeper)) or not class_folders(_expand(deeper)):
            break
        path = deeper
        task.notices = [f"{folder}: its classes are in {path}, which is used"]
    return path


def _leave_out(folder: str, task: _TaskDraft) -> None:
    """Set `leave_out` to the folders that cannot be classes: without a picture, or with too few images for both parts."""
    roots = {key: _expand(task.options[key]) for key in ("images", "train", "test") if key in task.options}
    least = 2 if "images" in roots else 1
    empty, unfit = [], []
    for key, root in roots.items():
        for name in class_folders(root):
            path = os.path.join(root, name)
            count = len(list(islice(images_below(path), least)))
            if count == 0 and not any(map(is_picture, others_below(path))):
                empty.append(name)
            elif 0 < count < least:
                unfit.append(name)
        if key == "images" and unfit:
            what = "only one image, but train and test need one each; left out of the classes"
            task.notices.append(f"{folder}: {quote_names(unfit)}: {what} (leave_out)")
    if len(roots) == 2:
        train, test = (class_folders(root, empty) for root in roots.values())
        matches = match_folders(train, test)
        if lone := sorted(({*train} - matches.keys()) | ({*test} - {*matches.values()})):
            unfit += lone
            what = "not in both train and test; left out of the classes"
            task.notices.append(f"{folder}: {quote_names(lone)}: {what} (leave_out)")
    if empty:
        names = quote_names(sorted({*empty}))
        task.notices.append(f"{folder}: no image lies in {names}; left out of the classes (leave_out)")
    unwanted = sorted({*empty, *unfit})
    if unwanted and all(class_folders(root, unwanted) for root in roots.values()):
        task.options["leave_out"] = unwanted


def _holds_any(path: str) -> bool:
    return any(True for _ in images_below(path)) or any(map(is_picture, others_below(path)))


def _is_split(path: str, name: str) -> bool:
    """Whether a folder named `train` or `test` holds class folders; otherwise it may be a class of that name."""
    return name.lower() in (*TRAIN, *TEST) and bool(class_folders(os.path.join(path, name)))


def _name_classes(folder: str, task: _TaskDraft) -> None:
    """Set `class_names`, all different, and note what looks odd about the classes."""
    root = _expand(task.options.get("images") or task.options["train"])
    classes = class_folders(root, task.options.get("leave_out", ()))
    for text in (root, *classes, *task.options.get("leave_out", ())):
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise MulkiError(f"{folder}: the name of {text!r} is not UTF-8; rename it")
    names = dict(zip(classes, readable_names(classes), strict=True))
    odd = [kind for kind, name in names.items() if not name or _printable(name) != name]
    odd += [kind for _, same in group_same_names(classes, list(names.values())) for kind in same if kind not in odd]
    if odd:
        names |= {kind: f"{_printable(names[kind] or 'class')} {i}" for i, kind in enumerate(odd, 1)}
        what = "cannot be told apart by their names; write better ones in the recipe"
        task.notices.append(f"{folder}: {', '.join(map(repr, odd))} {what}")
    task.options["class_names"] = names
    if len(classes) == 1:
        task.notices.append(f"{folder}: there is only one class; among the classes of its task every answer is right")
    if deeper := [name for name in classes if _only_deeper(os.path.join(root, name))]:
        what = f"the images of {', '.join(map(repr, deeper[:3]))} are in several folders further down"
        if base := task.options.get("images"):
            paths = " ".join(shlex.quote(os.path.join(base, name)) for name in deeper)
            what += f"; if those are the classes: mulki new recipe {paths}"
        task.notices.append(f"{folder}: {what}")


def _only_deeper(path: str) -> bool:
    """Whether a class folder has several folders with images, and no image directly in it."""
    return len(class_folders(path)) > 1 and all("/" in image for image in islice(images_below(path), 50))


def _lines(name: str, tasks: Sequence[_TaskDraft]) -> Iterator[str]:
    yield f"name: {dump_inline(name)}"
    yield "stream:"
    yield "  name: folders"
    yield "  tasks:                                  # learned in this order"
    lines = [kind + name for task in tasks for kind, name in task.options["class_names"].items()]
    written = len(lines) <= MOST_NAMES and sum(len(line.encode()) + 16 for line in lines) <= MAX_BYTES // 2
    for task in tasks:
        for i, (key, value) in enumerate(task.options.items()):
            lead = "    - " if i == 0 else "      "
            if key != "class_names":
                yield f"{lead}{key}: {dump_inline(value)}{_COMMENTS.get(key, '')}"
            elif written:
                yield f"{lead}class_names:                        # folder: what the model reads"
                yield from (f"        {dump_inline(kind)}: {dump_inline(name)}" for kind, name in value.items())
        yield '      templates: ["a photo of a {}."]     # or "a photo of a {}, a type of bird."; training uses the first'
    yield from _REST.splitlines()


_HEAD = """\
# Your own images, one task after another.
# The time it takes depends on the images and the machine; do a short first try. Relative paths start in the current folder:
# run these commands where you ran `mulki new recipe`.
#
#   mulki validate {file}
#   mulki run {file} --set train.iterations=10     # a first try
#   mulki run {file}
#   mulki run {file} --strategy finetune           # for comparison: what plain training forgets
"""

_COMMENTS = {
    "test_share": "                     # of each class's images; they are never trained on",
    "seed": "                             # which ones",
}

_REST = """\
# mulki-tiny is bundled with MulKI: 2.8 M weights, 48 x 48 pixels, 16 tokens, trained on drawings. It is for trying things out;
# for photographs use a large CLIP (a download of 600 MB on first use, and a GPU) and its settings: replace `model` and `train`
# below by these two lines:
#   model: {name: ViT-B-16-quickgelu, pretrained: openai}
#   train: {iterations: 1000, batch_size: 64, optimizer: {name: adamw, lr: 1.0e-5}, schedule: {name: cosine, warmup: 100}}
model: {name: mulki-tiny}
strategy: mulki-plus                        # others: mulki list strategies
train:
  iterations: 50                            # a task
  batch_size: 32
  optimizer: {name: adamw, lr: 5.0e-4}
  schedule: {name: cosine, warmup: 5}
  label_smoothing: 0.2
  workers: auto                             # processes that read images: one for each core but one
evaluate:
  classes: seen                             # seen: among all classes learned so far; task: among its task's own; all: all
seeds: [0]
"""
