"""What a data set's folder was found to hold, whatever its layout."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from attrs import define, field

from mulki_plugins.errors import MissingData, MulkiError
from mulki_plugins.streams.mtil.images import FileImages, PixelImages
from mulki_plugins.streams.mtil.listing import Listing, listing

Images = FileImages | PixelImages


class Unreadable(MulkiError):
    """A file or folder of a data set that is not what it should be; the message begins with its path."""


@define(kw_only=True)
class Contents:
    """Classes in the order of their labels, as the data set calls them, and the images of each part."""

    classes: list[str]
    parts: dict[str, Images]
    """`train` and `test`, or `all` where the data set has no split of its own."""
    named_in: Path
    """The file that names the classes, or the folder in which each has a folder."""
    damage: list[str] = field(factory=list)
    """What is missing or cannot be read, each with its path: such data cannot be used."""
    odd: list[str] = field(factory=list)
    """What is unlike the published data set, each with its path: such data can be used, but no number be compared."""


def lines_of(path: Path) -> list[tuple[str, str]]:
    """The lines of a text file that are not empty, each with its place `path:number`."""
    try:
        text = path.read_text("utf-8-sig")  # some editors begin a file with a mark
    except (OSError, UnicodeDecodeError) as error:
        raise Unreadable(f"{path}: {_reason(error)}") from error
    return [(f"{path}:{number}", line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]


def json_of(path: Path) -> Any:
    """A JSON file's value."""
    try:
        return json.loads(path.read_text("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise Unreadable(f"{path}: {_reason(error)}") from error


def mat_of(path: Path) -> dict[str, Any]:
    """The variables of a MATLAB file. MissingData where scipy is not installed, as for torchvision."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise MissingData(f"{path}: reading it needs the package 'scipy'", "pip install 'mulki[mtil]'") from error
    try:
        variables: dict[str, Any] = loadmat(path, squeeze_me=True)
    except Exception as error:  # scipy's readers raise almost anything over a damaged file
        raise Unreadable(f"{path}: this is no MATLAB file that can be read: {_reason(error)}") from error
    return variables


def below(folder: Path) -> Listing:
    """The files below a folder."""
    try:
        return listing(folder)
    except OSError as error:
        raise Unreadable(f"{error.filename or folder}: {_reason(error)}") from error


def files_of(folder: Path, files: Sequence[str], labels: Sequence[int], said_by: Path, into: Contents) -> FileImages:
    """The images that an annotation names, and in `into` which of them are not there."""
    found = below(folder)
    there = set(found.files)
    lost = [file for file in files if file not in there]
    if lost:
        what = "an image that is" if len(lost) == 1 else f"{len(lost):,} images that are"
        said = f"{folder / lost[0]}: {said_by.name} names {what} not there" + (", such as this" if lost[1:] else "")
        deeper = next((name for name in found.folders if f"{name}/{lost[0]}" in there), "")
        into.damage.append(f"{said}; it is in {folder / deeper}: move the images up" if deeper else said)
    return FileImages.of(folder, files, labels)


def unlabelled_folders(folder: Path, classes: Iterable[str], into: Contents) -> None:
    """Class folders of which the annotations know nothing."""
    known = set(classes)
    into.odd += [
        f"{folder / name}: a class folder that no annotation names"
        for name in below(folder).folders
        if name not in known
    ]


def some(mistakes: Sequence[str], most: int = 5) -> list[str]:
    """The first of many mistakes of one sort, and how many more there are."""
    left = len(mistakes) - most
    return [*mistakes[:most], *([f"{mistakes[0].partition(': ')[0]}: and {left:,} more like this"] if left > 0 else [])]


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
