"""One data set beside what is known of it: found, unlike the published one, damaged, or missing."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from attrs import frozen

from mulki_plugins.errors import MulkiError
from mulki_plugins.streams.mtil import coop
from mulki_plugins.streams.mtil.contents import Contents, Unreadable, some
from mulki_plugins.streams.mtil.declaration import Declaration, Split, declaration, readable
from mulki_plugins.streams.mtil.images import FileImages
from mulki_plugins.streams.mtil.layouts import READERS
from mulki_plugins.streams.mtil.splits import sizes_of_random_split

State = Literal["found", "odd", "damaged", "missing"]


@frozen(kw_only=True)
class Found:
    """A data set on disk. `contents` is there unless it is missing or nothing of it could be read."""

    declared: Declaration
    folder: Path
    split: Split
    state: State
    contents: Contents | None = None
    problems: tuple[str, ...] = ()
    """What keeps it from being used, each with its path."""
    differences: tuple[str, ...] = ()
    """What makes numbers on it incomparable with published ones, each with its path."""

    @property
    def expected(self) -> dict[str, int]:
        return self.declared.expected(self.split)

    @property
    def sizes(self) -> dict[str, int]:
        """Classes, training and test images as they are; empty where nothing could be read."""
        return {} if self.contents is None else _sizes(self.contents)

    @property
    def class_names(self) -> tuple[str, ...]:
        """What prompts call the classes, by label: as declared, or readable where the data set has a class of its own."""
        keys = self.contents.classes if self.contents else []
        declared = {} if self.of_split_file else self.declared.classes
        return tuple(declared.get(key) or readable(key) for key in keys)

    @property
    def of_split_file(self) -> bool:
        """Whether a file of CoOp names the classes."""
        return self.split == "coop" and bool(self.declared.split_file)


def look(name: str, root: Path, split: Split) -> Found:
    """The data set of that name below a root, without opening an image; what cannot be read is damaged, and said."""
    declared = declaration(name)
    folder = root / declared.folder
    try:
        return _found(declared, folder, root, split)
    except MulkiError as error:
        problems = [error.message] if isinstance(error, Unreadable) else error.lines()
    except OSError as error:
        problems = [f"{error.filename or folder}: {error.strerror or error}"]
    except Exception as error:  # of an annotation that is damaged in a way that no reader expects
        problems = [f"{folder}: its annotations cannot be read: {type(error).__name__}: {' '.join(str(error).split())}"]
    return Found(declared=declared, folder=folder, split=split, state="damaged", problems=tuple(problems))


def _found(declared: Declaration, folder: Path, root: Path, split: Split) -> Found:
    needs = [folder / need for need in declared.needs]
    if split == "coop" and declared.split_file:
        needs = [coop.split_file(declared, root), folder / declared.split_images]
    absent = [path for path in needs if not path.exists()]
    if not folder.is_dir() or all(path.name.startswith(".") for path in folder.iterdir()):
        return Found(declared=declared, folder=folder, split=split, state="missing")
    if absent:
        problems = [f"{path}: not there{_where_else(path, folder)}" for path in absent]
        without_split_file = split == "coop" and bool(declared.split_file) and needs[0] in absent
        if without_split_file:
            problems[0] += f"; {coop.WHERE}"
        if declared.get and len(absent) > without_split_file:
            problems.append(f"{folder} is not whole: {declared.how_to_get(root)}")
        return Found(declared=declared, folder=folder, split=split, state="damaged", problems=tuple(problems))
    contents = _read(declared, root, split)
    empty = [f"{folder}: no {part} images" for part, n in _sizes(contents).items() if not n and part != "classes"]
    problems = [*contents.damage, *empty]
    differences = _differences(declared, contents, split)
    state: State = "damaged" if problems else "odd" if differences else "found"
    return Found(
        declared=declared, folder=folder, split=split, state=state, contents=contents, problems=tuple(problems),
        differences=tuple(differences),
    )  # fmt: skip


def _where_else(path: Path, folder: Path) -> str:
    """A hint, where a file is one folder deeper than it should be, as some archives unpack."""
    place = path.relative_to(folder) if path.is_relative_to(folder) else Path(path.name)
    for inner in sorted(folder.iterdir()):
        if inner.is_dir() and (inner / place).exists():
            return f", but {inner / place} is; move it up"
    return ""


def _read(declared: Declaration, root: Path, split: Split) -> Contents:
    if split == "coop" and declared.split_file:
        return coop.of_file(declared, root)
    contents = READERS[declared.name](root / declared.folder, declared)
    return coop.of_official(declared, contents) if split == "coop" else contents


def _sizes(contents: Contents) -> dict[str, int]:
    parts = {part: len(images) for part, images in contents.parts.items()}
    if "all" in parts:
        parts["train"], parts["test"] = sizes_of_random_split(parts.pop("all"))
    return {"classes": len(contents.classes), **parts}


def _shared(contents: Contents) -> int:
    """How many image files are in both parts."""
    train, test = (contents.parts.get(part) for part in ("train", "test"))
    if not isinstance(train, FileImages) or not isinstance(test, FileImages) or train.folder != test.folder:
        return 0
    return len(np.intersect1d(train.files, test.files))


def _differences(declared: Declaration, contents: Contents, split: Split) -> list[str]:
    """Classes and numbers of images that are not the published ones."""
    found = list(contents.odd)
    if not (split == "coop" and declared.split_file):
        place = contents.named_in
        inside = "all" in contents.parts and place.is_dir()  # a folder for each class lies in it
        more = [key for key in contents.classes if key not in declared.classes]
        fewer = [key for key in declared.classes if key not in contents.classes]
        found += some([f"{place / key if inside else place}: a class too many: {key!r}" for key in more])
        found += some([f"{place / key if inside else place}: a class too few: {key!r}" for key in fewer])
        if not more and not fewer and declared.name != "SUN397" and contents.classes != list(declared.classes):
            found.append(f"{place}: the classes stand in another order than the published one")
    if shared := _shared(contents):
        found.append(f"{contents.named_in}: {shared:,} images are both training and test images")
    sizes = _sizes(contents)
    for what, n in declared.expected(split).items():
        if sizes[what] != n:
            found.append(
                f"{contents.named_in}: {sizes[what]:,} {what if what == 'classes' else f'{what} images'}, expected {n:,}"
            )
    return found
