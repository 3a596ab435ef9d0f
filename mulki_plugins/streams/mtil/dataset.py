"""One data set on disk, compared with the published one: found, different, damaged, or missing."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from attrs import frozen

from mulki_plugins.errors import MulkiError
from mulki_plugins.streams.images import FileImages
from mulki_plugins.streams.mtil import coop
from mulki_plugins.streams.mtil.contents import Contents, Unreadable, shorten
from mulki_plugins.streams.mtil.declaration import Declaration, Split, declaration, prompt_name
from mulki_plugins.streams.mtil.layouts import READERS
from mulki_plugins.streams.split import random_split_sizes

State = Literal["found", "odd", "damaged", "missing"]


@frozen(kw_only=True)
class DatasetOnDisk:
    """A data set on disk. `contents` is None if it is missing or could not be read at all."""

    declared: Declaration
    folder: Path
    split: Split
    state: State
    contents: Contents | None = None
    problems: tuple[str, ...] = ()
    """Why it cannot be used, each with its path."""
    differences: tuple[str, ...] = ()
    """Why numbers on it cannot be compared with published ones, each with its path."""

    @property
    def expected(self) -> dict[str, int]:
        """Published numbers of classes, training images and test images."""
        return self.declared.expected(self.split)

    @property
    def sizes(self) -> dict[str, int]:
        """The same numbers on disk; empty if nothing could be read."""
        return {} if self.contents is None else _count(self.contents)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The class names of prompts, by label: as declared, or made readable for a class that is not declared."""
        keys = self.contents.classes if self.contents else []
        declared = {} if _has_split_file(self.declared, self.split) else self.declared.classes
        return tuple(declared.get(key) or prompt_name(key) for key in keys)


def look(name: str, root: Path, split: Split) -> DatasetOnDisk:
    """The data set of that name in the root folder; no image is opened. If it cannot be read, it is damaged."""
    declared = declaration(name)
    folder = root / declared.folder
    try:
        return _look(declared, folder, root, split)
    except MulkiError as error:
        problems = [error.message] if isinstance(error, Unreadable) else error.lines()
    except OSError as error:
        problems = [f"{error.filename or folder}: {error.strerror or error}"]
    except Exception as error:  # annotations damaged in a way that no reader expects
        problems = [f"{folder}: its annotations cannot be read: {type(error).__name__}: {' '.join(str(error).split())}"]
    return DatasetOnDisk(declared=declared, folder=folder, split=split, state="damaged", problems=tuple(problems))


def _look(declared: Declaration, folder: Path, root: Path, split: Split) -> DatasetOnDisk:
    if not folder.is_dir() or all(path.name.startswith(".") for path in folder.iterdir()):
        return DatasetOnDisk(declared=declared, folder=folder, split=split, state="missing")
    if problems := _missing_files(declared, folder, root, split):
        return DatasetOnDisk(declared=declared, folder=folder, split=split, state="damaged", problems=tuple(problems))
    contents = _read(declared, root, split)
    empty = [f"{folder}: no {part} images" for part, n in _count(contents).items() if not n and part != "classes"]
    problems = [*contents.damage, *empty]
    differences = _differences(declared, contents, split)
    state: State = "damaged" if problems else "odd" if differences else "found"
    return DatasetOnDisk(
        declared=declared, folder=folder, split=split, state=state, contents=contents, problems=tuple(problems),
        differences=tuple(differences),
    )  # fmt: skip


def _has_split_file(declared: Declaration, split: Split) -> bool:
    """Whether CoOp's split file names the classes and images."""
    return split == "coop" and bool(declared.split_file)


def _missing_files(declared: Declaration, folder: Path, root: Path, split: Split) -> list[str]:
    """A message for each needed file that is absent."""
    needs = [folder / need for need in declared.needs]
    if with_split_file := _has_split_file(declared, split):
        needs = [coop.split_file(declared, root), folder / declared.split_images]
    absent = [path for path in needs if not path.exists()]
    problems = [f"{path}: not there{_hint_deeper(path, folder)}" for path in absent]
    if no_split_file := with_split_file and needs[0] in absent:
        problems[0] += f"; {coop.SOURCE}"
    if declared.get and len(absent) > no_split_file:
        problems.append(f"{folder} is not whole: {declared.how_to_get(root)}")
    return problems


def _hint_deeper(path: Path, folder: Path) -> str:
    """A hint if the file is one folder too deep, as some archives unpack."""
    relative = path.relative_to(folder) if path.is_relative_to(folder) else Path(path.name)
    for inner in sorted(folder.iterdir()):
        if inner.is_dir() and (inner / relative).exists():
            return f", but {inner / relative} is; move it up"
    return ""


def _read(declared: Declaration, root: Path, split: Split) -> Contents:
    if _has_split_file(declared, split):
        return coop.read_split_file(declared, root)
    contents = READERS[declared.name](root / declared.folder, declared)
    return coop.from_official(declared, contents) if split == "coop" else contents


def _count(contents: Contents) -> dict[str, int]:
    parts = {part: len(images) for part, images in contents.parts.items()}
    if "all" in parts:
        parts["train"], parts["test"] = random_split_sizes(parts.pop("all"))
    return {"classes": len(contents.classes), **parts}


def _differences(declared: Declaration, contents: Contents, split: Split) -> list[str]:
    """Classes and numbers of images that are not the published ones."""
    differences = list(contents.odd)
    if not _has_split_file(declared, split):
        place = contents.named_in
        in_folders = "all" in contents.parts and place.is_dir()
        extra = [key for key in contents.classes if key not in declared.classes]
        absent = [key for key in declared.classes if key not in contents.classes]
        for what, keys in (("a class too many", extra), ("a class too few", absent)):
            differences += shorten([f"{place / key if in_folders else place}: {what}: {key!r}" for key in keys])
        if not extra and not absent and declared.name != "SUN397" and contents.classes != list(declared.classes):
            differences.append(f"{place}: the classes are in another order than the published one")
    if shared := _count_shared(contents):
        differences.append(f"{contents.named_in}: {shared:,} images are both training and test images")
    sizes = _count(contents)
    for what, n in declared.expected(split).items():
        if sizes[what] != n:
            unit = what if what == "classes" else f"{what} images"
            differences.append(f"{contents.named_in}: {sizes[what]:,} {unit}, expected {n:,}")
    return differences


def _count_shared(contents: Contents) -> int:
    """The number of image files in both parts."""
    train, test = (contents.parts.get(part) for part in ("train", "test"))
    if not isinstance(train, FileImages) or not isinstance(test, FileImages) or train.folder != test.folder:
        return 0
    return len(np.intersect1d(train.names, test.names))
