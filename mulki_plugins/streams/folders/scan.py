"""What lies in a folder of class folders; no file is opened, and the file system's order never shows."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import groupby

from mulki_plugins.errors import MulkiError
from mulki_plugins.streams.entries import is_image, is_system


def class_folders(root: str, leave_out: Collection[str] = ()) -> list[str]:
    """The names of the folders in a folder, sorted, without hidden ones, a system's own and those to leave out.

    MulkiError where the folder cannot be read.
    """
    unwanted = {same_name(name) for name in leave_out}
    return [name for name in all_folders(root) if not is_system(name) and same_name(name) not in unwanted]


def all_folders(root: str) -> list[str]:
    """The names of all folders in a folder, sorted. MulkiError where it cannot be read."""
    try:
        with os.scandir(root) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir())
    except OSError as error:
        raise _unreadable(root, error) from error


def holds_images(root: str) -> bool:
    """Whether an image lies directly in a folder."""
    try:
        with os.scandir(root) as entries:
            return any(_is_image(entry.name) and not entry.is_dir() for entry in entries)
    except OSError as error:
        raise _unreadable(root, error) from error


def files_in(root: str) -> list[str]:
    """The names of the files that lie directly in a folder, sorted, without hidden ones and a system's own."""
    try:
        with os.scandir(root) as entries:
            return sorted(entry.name for entry in entries if not is_system(entry.name) and not entry.is_dir())
    except OSError as error:
        raise _unreadable(root, error) from error


def images_below(folder: str) -> Iterator[str]:
    """The image files in a folder and in those below it, as paths from there with `/`, in no order.

    Links are followed, but in no circle. Other files are passed over. MulkiError where a folder cannot be read, or an
    image's link leads nowhere.
    """
    return _below(folder, "", frozenset(), _is_image)


def others_below(folder: str) -> Iterator[str]:
    """The files that are no images, as by `images_below`, without hidden ones and a system's own."""
    return _below(folder, "", frozenset(), lambda name: not _is_image(name))


def _below(folder: str, prefix: str, above: frozenset[tuple[int, int]], wanted: Callable[[str], bool]) -> Iterator[str]:
    try:
        status = os.stat(folder)
        here = (status.st_dev, status.st_ino)
        if here in above:
            return
        with os.scandir(folder) as entries:
            for entry in entries:
                if is_system(entry.name):
                    continue
                if entry.is_dir():
                    yield from _below(entry.path, f"{prefix}{entry.name}/", above | {here}, wanted)
                elif wanted(entry.name):
                    if not entry.is_file() and _is_image(entry.name):
                        raise MulkiError(f"{entry.path}: this is no file, or a link that leads nowhere")
                    yield prefix + entry.name
    except OSError as error:
        raise _unreadable(folder, error) from error


def same_name(folder: str) -> str:
    """A folder's name as it is compared: some systems take accents apart from their letters."""
    return unicodedata.normalize("NFC", folder)


def counterparts(names: Sequence[str], others: Sequence[str]) -> dict[str, str]:
    """For each class folder the one of another part that is its class's: spelt alike, or alike but for case if only one is."""
    found: dict[str, str] = {}
    for spell in (str, same_name, lambda name: same_name(name).casefold()):
        left = [[name for name in names if name not in found], sorted({*others}.difference(found.values()))]
        mine, theirs = ({key: list(group) for key, group in groupby(sorted(part, key=spell), spell)} for part in left)
        for key, alike in mine.items():
            if len(alike) == 1 and len(theirs.get(key, ())) == 1:
                found[alike[0]] = theirs[key][0]
    return found


def _is_image(name: str) -> bool:
    return is_image(name) and not is_system(name)


def _unreadable(path: str, error: OSError) -> MulkiError:
    return MulkiError(f"{error.filename or path}: cannot be read: {error.strerror or error}")
