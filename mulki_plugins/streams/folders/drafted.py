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
from mulki_plugins.streams.entries import is_picture
from mulki_plugins.streams.folders.declared import TEST, TRAIN, check_tasks, passed_over
from mulki_plugins.streams.folders.names import readable_names, same_names
from mulki_plugins.streams.folders.scan import class_folders, counterparts, holds_images, images_below, others_below

MOST_NAMES = 2000
"""How many class names are written out; more would make a recipe that nobody reads."""


@frozen
class Draft:
    """A recipe's name, its lines, and what its user should know."""

    name: str
    lines: list[str]
    notices: list[str]

    def text(self, file: str) -> str:
        """The recipe as it stands in a file of that name."""
        return "\n".join([*_HEAD.format(file=shlex.quote(file)).splitlines(), *self.lines]) + "\n"


@define
class _Found:
    """One task as it will be written, and what is odd about it."""

    options: dict[str, Any]
    notices: list[str] = field(factory=list)


def draft(folders: Sequence[str], name: str | None = None) -> Draft:
    """The recipe for these folders, one task each. Mistakes, of all folders at once, where one cannot be learned."""
    if name is not None and (problem := check_name(name)):
        raise MulkiError(f"--name: {problem}")
    wrong, found = [], []
    for folder, task in zip(folders, _names(folders), strict=True):
        try:
            found.append(_found(folder, task))
            wrong += [_of_folder(folder, error.message) for error in check_tasks([found[-1].options])]
        except MulkiError as error:
            wrong += error.lines()
    if wrong:
        raise Mistakes(wrong)
    name = name or _recipe_name([each.options["name"] for each in found])
    notices = [notice for each in found for notice in each.notices]
    return Draft(name, list(_lines(name, found)), notices)


def _of_folder(folder: str, message: str) -> str:
    """With the folder in front, where the message does not begin with it anyway."""
    return message if message.startswith(_as_typed(folder)) else f"{folder}: {message}"


def _names(folders: Sequence[str]) -> list[str]:
    """A name for each task: its folder's, with those of the folders above where two are the same."""
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
    kept = "".join(c if c.isprintable() and c != "/" else "-" for c in unicodedata.normalize("NFC", text))
    return kept.strip() or "images"


def _recipe_name(tasks: Sequence[str]) -> str:
    said = "-".join(tasks) if len(tasks) <= 3 else f"{tasks[0]}-and-{len(tasks) - 1}-more"
    plain = unicodedata.normalize("NFKD", said).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9._-]+", "-", plain).strip("-._")[:80] or "my-images"


def _found(folder: str, task: str) -> _Found:
    path = _as_typed(folder)
    if not os.path.isdir(_here(path)):
        what = "this is a file, expected a folder" if os.path.exists(_here(path)) else "no such folder"
        raise MulkiError(f"{folder}: {what}")
    result = _Found({"name": task})
    path = _where_classes_are(folder, path, result)
    there = class_folders(_here(path))
    parts = {name.lower(): name for name in reversed(there) if _is_part(_here(path), name)}
    train = next((parts[name] for name in TRAIN if name in parts), None)
    tests = [parts[name] for name in TEST if name in parts]
    if train and tests:
        result.options |= {"train": os.path.join(path, train), "test": os.path.join(path, tests[0])}
        if others := [name for name in there if name not in (train, tests[0])]:
            result.notices.append(f"{folder}: {train} and {tests[0]} are used, and not {', '.join(map(repr, others))}")
    elif train or tests:
        result.options |= {"images": os.path.join(path, train or tests[0]), "test_share": 0.2, "seed": 0}
        result.notices.append(
            f"{folder}: there is {train or tests[0]!r} alone, of which a fifth is held out for the test"
        )
        if others := [name for name in there if name != (train or tests[0])]:
            result.notices.append(f"{folder}: no class folders lie in {', '.join(map(repr, others))}; not used")
    else:
        result.options |= {"images": path, "test_share": 0.2, "seed": 0}
    _leave_out(folder, result)
    _name_classes(folder, result)
    return result


def _as_typed(folder: str) -> str:
    """The path as it was typed, without what says nothing; a relative one stays so."""
    short = os.path.normpath(folder)
    return folder if short.startswith("~") and not folder.startswith("~") else short


def _here(path: str) -> str:
    return os.path.expanduser(path)


def _where_classes_are(folder: str, path: str, task: _Found) -> str:
    """The folder itself, or, as unpacking an archive often leaves it, the only one in it, if the classes lie in that."""
    for _ in range(_DEEPEST):
        inside = [name for name in class_folders(_here(path)) if _holds_any(os.path.join(_here(path), name))]
        if len(inside) != 1 or _is_part(_here(path), inside[0]):
            break
        deeper = os.path.join(path, inside[0])
        if holds_images(_here(deeper)) or not class_folders(_here(deeper)):
            break
        path = deeper
        task.notices = [f"{folder}: its classes lie in {path}, which is taken"]
    return path


_DEEPEST = 4
"""How many folders in a folder are looked into for the classes."""


def _leave_out(folder: str, task: _Found) -> None:
    """Write down which folders are no classes, or cannot be: those without a picture, or with too few for both parts."""
    roots = {key: _here(task.options[key]) for key in ("images", "train", "test") if key in task.options}
    least = 2 if "images" in roots else 1
    empty, few = [], []
    for key, root in roots.items():
        for name in class_folders(root):
            path = os.path.join(root, name)
            count = len(list(islice(images_below(path), least)))
            if count == 0 and not any(map(is_picture, others_below(path))):
                empty.append(name)
            elif 0 < count < least:
                few.append(name)
        if key == "images" and few:
            what = "one image alone, and train and test need one each; left out of the classes"
            task.notices.append(f"{folder}: {_quoted(few)}: {what} (leave_out)")
    if len(roots) == 2:
        train, test = (class_folders(root, empty) for root in roots.values())
        matched = counterparts(train, test)
        if lone := sorted(({*train} - matched.keys()) | ({*test} - {*matched.values()})):
            few += lone
            what = "not in both parts; left out of the classes"
            task.notices.append(f"{folder}: {_quoted(lone)}: {what} (leave_out)")
    if empty:
        where = _quoted(sorted({*empty}))
        task.notices.append(f"{folder}: no image lies in {where}; left out of the classes (leave_out)")
    unwanted = sorted({*empty, *few})
    if unwanted and all(class_folders(root, unwanted) for root in roots.values()):
        task.options["leave_out"] = unwanted


def _quoted(names: Sequence[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(map(repr, names[:8])) + more


def _holds_any(path: str) -> bool:
    return any(True for _ in images_below(path)) or any(map(is_picture, others_below(path)))


def _is_part(path: str, name: str) -> bool:
    """Whether a folder named `train` or `test` holds class folders; a class may be called so too."""
    return name.lower() in (*TRAIN, *TEST) and bool(class_folders(os.path.join(path, name)))


def _name_classes(folder: str, task: _Found) -> None:
    """Write the class names out, each apart from the others, and say what looks odd about the classes."""
    root = _here(task.options.get("images") or task.options["train"])
    classes = class_folders(root, task.options.get("leave_out", ()))
    for text in (root, *classes, *task.options.get("leave_out", ())):
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise MulkiError(f"{folder}: the name of {text!r} is no UTF-8 text; rename it")
    names = dict(zip(classes, readable_names(classes), strict=True))
    odd = [kind for kind, name in names.items() if not name or _printable(name) != name]
    odd += [kind for _, same in same_names(classes, list(names.values())) for kind in same if kind not in odd]
    if odd:
        names |= {kind: f"{_printable(names[kind] or 'class')} {i}" for i, kind in enumerate(odd, 1)}
        listed = ", ".join(map(repr, odd))
        task.notices.append(
            f"{folder}: {listed} would not be told apart by their names; write better ones in the recipe"
        )
    task.options["class_names"] = names
    if len(classes) == 1:
        task.notices.append(f"{folder}: there is one class alone, among which nothing can be told apart: always 100 %")
    if deeper := [name for name in classes if _only_deeper(os.path.join(root, name))]:
        what = f"the images of {', '.join(map(repr, deeper[:3]))} lie in several folders deeper down"
        typed = " ".join(shlex.quote(os.path.join(folder, name)) for name in deeper[:3])
        task.notices.append(f"{folder}: {what}; if those are the classes: mulki new recipe {typed}")
    task.notices += passed_over([task.options])


def _only_deeper(path: str) -> bool:
    """Whether a class folder has several folders with images, and none directly."""
    return len(class_folders(path)) > 1 and all("/" in image for image in islice(images_below(path), 50))


def _lines(name: str, tasks: Sequence[_Found]) -> Iterator[str]:
    yield f"name: {dump_inline(name)}"
    yield "stream:"
    yield "  name: folders"
    yield "  tasks:                                  # learned in this order"
    written = sum(len(task.options["class_names"]) for task in tasks) <= MOST_NAMES
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
# How long it takes depends on the images and the machine; a first try tells. Relative paths begin in the current folder:
# type these where you typed `mulki new recipe`.
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
# mulki-tiny is bundled with MulKI: 2.8 M weights, 48 x 48 pixels, 16 tokens, trained on drawings. It shows that it works;
# for results on photographs take a large CLIP (a download of 600 MB on first use, and a GPU) and its settings, with these
# two lines in place of `model` and `train` below:
#   model: {name: ViT-B-16-quickgelu, pretrained: openai}
#   train: {iterations: 1000, batch_size: 64, optimizer: {name: adamw, lr: 1.0e-5}, schedule: {name: cosine, warmup: 100}}
model: {name: mulki-tiny}
strategy: mulki                             # others: mulki list strategies
train:
  iterations: 50                            # a task
  batch_size: 32
  optimizer: {name: adamw, lr: 5.0e-4}
  schedule: {name: cosine, warmup: 5}
  label_smoothing: 0.2
  workers: 2                                # processes that read images
evaluate:
  classes: seen                             # seen: among all classes learned so far; task: among its task's own; all: all
seeds: [0]
"""
