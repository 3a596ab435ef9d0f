"""CoOp's splits (arXiv 2109.01134), as DIKI and DPW use them: from the user's own `split_zhou_*.json`."""

from __future__ import annotations

import posixpath
from collections import Counter
from pathlib import Path
from typing import Any

from attrs import evolve

from mulki_plugins.characters import printable
from mulki_plugins.streams.mtil.contents import Contents, Unreadable, files_of, json_of, some
from mulki_plugins.streams.mtil.declaration import Declaration
from mulki_plugins.streams.mtil.splits import four_fifths

WHERE = "CoOp's split files are linked from https://github.com/KaiyangZhou/CoOp/blob/main/DATASETS.md"
MOST_CLASSES = 1 << 20
"""A label above that is no label."""


def split_file(declared: Declaration, root: Path) -> Path:
    """Where a data set's file is, in its folder or in the root; where it should be, if there is none."""
    places = [root / declared.folder / declared.split_file, root / declared.split_file]
    return next((place for place in places if place.is_file()), places[0])


def of_file(declared: Declaration, root: Path) -> Contents:
    """What a `split_zhou_*.json` says: for train and test (and val, which is not used) a list of [image, label, class name]."""
    path = split_file(declared, root)
    said = json_of(path)
    into = Contents(classes=[], parts={}, named_in=path)
    names: dict[int, str] = {}
    images = root / declared.folder / declared.split_images
    for part in ("train", "test"):
        rows = said.get(part) if isinstance(said, dict) else None
        if not isinstance(rows, list):
            raise Unreadable(f"{path}: expected a mapping with lists named 'train' and 'test'")
        for row in rows:
            _check(path, part, row)
            if names.setdefault(row[1], row[2]) != row[2]:
                raise Unreadable(f"{path}: the class {row[1]} is called {names[row[1]]!r} and {row[2]!r}")
        files = [posixpath.normpath(row[0].lstrip("/")) for row in rows]
        into.parts[part] = files_of(images, files, [row[1] for row in rows], path, into)
    if sorted(names) != list(range(len(names))):
        raise Unreadable(f"{path}: expected classes from 0 to {len(names) - 1}, got {min(names)} to {max(names)}")
    into.classes = [names[i] for i in range(len(names))]
    into.odd += some([f"{path}: {n} classes are called {name!r}" for name, n in Counter(into.classes).items() if n > 1])
    return into


def _check(path: Path, part: str, row: Any) -> None:
    fine = (
        isinstance(row, list)
        and len(row) == 3
        and isinstance(row[0], str)
        and type(row[1]) is int
        and isinstance(row[2], str)
    )
    if not fine or not 0 <= row[1] < MOST_CLASSES or ".." in Path(row[0]).parts or not _is_name(row[2]):
        raise Unreadable(f"{path}: expected [image, label, class name] in {part!r}, got {str(row)[:80]}")


def _is_name(text: str) -> bool:
    """Whether a sentence can have it."""
    return bool(text.strip()) and printable(text) == text


def of_official(declared: Declaration, contents: Contents) -> Contents:
    """Where CoOp has no file: Aircraft as it is; of CIFAR-100 and MNIST four fifths of each class's training images.

    Which images these are no paper says; they are drawn here with a seed of our own.
    """
    if declared.images["coop"] == declared.images["zscl"]:
        return contents
    train = contents.parts["train"]
    return evolve(contents, parts={**contents.parts, "train": train.chosen(four_fifths(train.labels))})
