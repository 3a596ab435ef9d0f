"""CoOp's splits (arXiv 2109.01134), used by DIKI and DPW: from the user's own `split_zhou_*.json`."""

from __future__ import annotations

import posixpath
from collections import Counter
from pathlib import Path
from typing import Any

from attrs import evolve

from mulki_plugins.characters import printable
from mulki_plugins.streams.mtil.contents import Contents, Unreadable, read_json, shorten
from mulki_plugins.streams.mtil.declaration import Declaration
from mulki_plugins.streams.split import four_fifths

SOURCE = "CoOp's split files are linked from https://github.com/KaiyangZhou/CoOp/blob/main/DATASETS.md"
_MOST_CLASSES = 1 << 20


def split_file(declared: Declaration, root: Path) -> Path:
    """The path of a data set's split file: in its folder, or in the root if only there."""
    paths = [root / declared.folder / declared.split_file, root / declared.split_file]
    return next((path for path in paths if path.is_file()), paths[0])


def read_split_file(declared: Declaration, root: Path) -> Contents:
    """A `split_zhou_*.json`: lists of [image, label, class name] for train, test, and val (not used)."""
    path = split_file(declared, root)
    value = read_json(path)
    contents = Contents(classes=[], parts={}, named_in=path)
    names: dict[int, str] = {}
    for part in ("train", "test"):
        rows = value.get(part) if isinstance(value, dict) else None
        if not isinstance(rows, list):
            raise Unreadable(f"{path}: expected a mapping with lists named 'train' and 'test'")
        for row in rows:
            if not _is_row(row):
                raise Unreadable(f"{path}: expected [image, label, class name] in {part!r}, got {str(row)[:80]}")
            if names.setdefault(row[1], row[2]) != row[2]:
                raise Unreadable(f"{path}: the class {row[1]} is called {names[row[1]]!r} and {row[2]!r}")
        files = [posixpath.normpath(row[0].lstrip("/")) for row in rows]
        contents.add_files(part, root / declared.folder / declared.split_images, files, [row[1] for row in rows], path)
    if sorted(names) != list(range(len(names))):
        raise Unreadable(f"{path}: expected classes from 0 to {len(names) - 1}, got {min(names)} to {max(names)}")
    contents.classes = [names[i] for i in range(len(names))]
    repeated = [(name, n) for name, n in Counter(contents.classes).items() if n > 1]
    contents.odd += shorten([f"{path}: {n} classes are called {name!r}" for name, n in repeated])
    return contents


def _is_row(row: Any) -> bool:
    """Whether it is [image, label, class name], the image below the folder and the name fit for a sentence."""
    if not isinstance(row, list) or len(row) != 3:
        return False
    image, label, name = row
    if not isinstance(image, str) or type(label) is not int or not isinstance(name, str):
        return False
    return (
        0 <= label < _MOST_CLASSES and ".." not in Path(image).parts and bool(name.strip()) and printable(name) == name
    )


def from_official(declared: Declaration, contents: Contents) -> Contents:
    """CoOp's split of a data set without a split file: Aircraft's own; of CIFAR-100 and MNIST four fifths of each class.

    No paper says which training images these are; they are drawn here with a seed of our own.
    """
    if declared.images["coop"] == declared.images["zscl"]:
        return contents
    train = contents.parts["train"]
    return evolve(contents, parts={**contents.parts, "train": train.take(four_fifths(train.labels))})
