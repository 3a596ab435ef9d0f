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
from mulki_plugins.recipe.check import name_problem
from mulki_plugins.recipe.emit import flow_yaml
from mulki_plugins.streams.folders.declared import TEST, TRAIN, check_tasks
from mulki_plugins.streams.folders.names import readable_names, same_names
from mulki_plugins.streams.folders.scan import class_folders, images_below

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
    if name is not None and (problem := name_problem(name)):
        raise MulkiError(f"--name: {problem}")
    wrong, found = [], []
    for folder, task in zip(folders, _names(folders), strict=True):
        try:
            found.append(_found(folder, task))
            wrong += [f"{folder}: {error.message}" for error in check_tasks([found[-1].options])]
        except MulkiError as error:
            wrong += error.lines()
    if wrong:
        raise Mistakes(wrong)
    name = name or _recipe_name([each.options["name"] for each in found])
    notices = [notice for each in found for notice in each.notices]
    return Draft(name, list(_lines(name, found)), notices)


def _names(folders: Sequence[str]) -> list[str]:
    """A name for each task: its folder's, with those of the folders above where two are the same."""
    paths = [os.path.abspath(os.path.expanduser(folder)).rstrip(os.sep).split(os.sep) for folder in folders]
    names: list[str] = []
    for path in paths:
        depth = 1
        while depth < len(path) and any(other is not path and other[-depth:] == path[-depth:] for other in paths):
            depth += 1
        text = "-".join(part for part in path[-depth:] if part) or "images"
        base = name = _printable(text)
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
    path = os.path.abspath(os.path.expanduser(folder))
    if not os.path.isdir(path):
        what = "this is a file, expected a folder" if os.path.exists(path) else "no such folder"
        raise MulkiError(f"{folder}: {what}")
    there = class_folders(path)
    parts = {name.lower(): name for name in reversed(there) if _is_part(path, name)}
    train = next((parts[name] for name in TRAIN if name in parts), None)
    tests = [parts[name] for name in TEST if name in parts]
    result = _Found({"name": task})
    if train and tests:
        result.options |= {"train": os.path.join(path, train), "test": os.path.join(path, tests[0])}
        if others := [name for name in there if name not in (train, tests[0])]:
            result.notices.append(f"{folder}: {train} and {tests[0]} are used, and not {', '.join(map(repr, others))}")
    elif train or tests:
        result.options |= {"images": os.path.join(path, train or tests[0]), "test_share": 0.2, "seed": 0}
        result.notices.append(
            f"{folder}: there is {train or tests[0]!r} alone, of which a fifth is held out for the test"
        )
    else:
        result.options |= {"images": path, "test_share": 0.2, "seed": 0}
    _name_classes(folder, result)
    return result


def _is_part(path: str, name: str) -> bool:
    """Whether a folder named `train` or `test` holds class folders; a class may be called so too."""
    return name.lower() in (*TRAIN, *TEST) and bool(class_folders(os.path.join(path, name)))


def _name_classes(folder: str, task: _Found) -> None:
    """Write the class names out, each apart from the others, and say what looks odd about the classes."""
    root = task.options.get("images") or task.options["train"]
    classes = class_folders(root)
    for text in (root, *classes):
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
        task.notices.append(f"{folder}: {what}; if those are the classes: mulki new recipe --from-folders {typed}")


def _only_deeper(path: str) -> bool:
    """Whether a class folder has several folders with images, and none directly."""
    return len(class_folders(path)) > 1 and all("/" in image for image in islice(images_below(path), 50))


def _lines(name: str, tasks: Sequence[_Found]) -> Iterator[str]:
    yield f"name: {flow_yaml(name)}"
    yield "stream:"
    yield "  name: folders"
    yield "  tasks:                                  # learned in this order"
    written = sum(len(task.options["class_names"]) for task in tasks) <= MOST_NAMES
    for task in tasks:
        for i, (key, value) in enumerate(task.options.items()):
            lead = "    - " if i == 0 else "      "
            if key != "class_names":
                yield f"{lead}{key}: {flow_yaml(value)}{_COMMENTS.get(key, '')}"
            elif written:
                yield f"{lead}class_names:                        # folder: what the model reads"
                yield from (f"        {flow_yaml(kind)}: {flow_yaml(name)}" for kind, name in value.items())
        yield '      templates: ["a photo of a {}."]     # such as "a photo of a {}, a type of bird."; training uses the first'
    yield from _REST.splitlines()


_HEAD = """\
# Your own images, one task after another.
# How long it takes depends on the images and the machine; a first try with `--set train.iterations=5` tells.
#
#   mulki validate {file}
#   mulki run {file}
#   mulki run {file} --strategy finetune     # for comparison: what plain training forgets
"""

_COMMENTS = {
    "test_share": "                     # of each class's images; they are never trained on",
    "seed": "                             # which ones",
}

_REST = """\
# mulki-tiny is bundled with MulKI: 2.8 M weights, 48 x 48 pixels, 16 tokens, trained on drawings. It shows that everything works;
# for results on photographs take a large CLIP (a download of 600 MB on first use, and a GPU) and its settings:
#   model: {name: ViT-B-16-quickgelu, pretrained: openai}
#   train: {iterations: 1000, batch_size: 64, optimizer: {name: adamw, lr: 1.0e-5}, schedule: {name: cosine, warmup: 100}, ...}
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
  classes: task                             # task: among a task's own classes; seen: among all learned; all: among all
seeds: [0]
"""
