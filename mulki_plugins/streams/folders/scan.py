"""What lies in a folder of class folders; no file is opened, and the file system's order never shows."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator

from mulki_plugins.errors import MulkiError

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
"""Of image files, in lower or upper case."""
_NOT_OURS = ("__MACOSX", "@eaDir")
"""Folders that programs leave behind; so are names with a leading dot."""


def class_folders(root: str) -> list[str]:
    """The names of the folders in a folder, sorted; hidden ones are passed over. MulkiError where it cannot be read."""
    try:
        with os.scandir(root) as entries:
            return sorted(entry.name for entry in entries if not _ignored(entry.name) and entry.is_dir())
    except OSError as error:
        raise _unreadable(root, error) from error


def holds_images(root: str) -> bool:
    """Whether an image lies directly in a folder."""
    try:
        with os.scandir(root) as entries:
            return any(_is_image(entry.name) and not entry.is_dir() for entry in entries)
    except OSError as error:
        raise _unreadable(root, error) from error


def images_below(folder: str) -> Iterator[str]:
    """The image files in a folder and in those below it, as paths from there with `/`, in no order.

    Links are followed, but in no circle. Other files are passed over. MulkiError where a folder cannot be read, or an
    image's link leads nowhere.
    """
    return _below(folder, "", frozenset())


def _below(folder: str, prefix: str, above: frozenset[tuple[int, int]]) -> Iterator[str]:
    try:
        status = os.stat(folder)
        here = (status.st_dev, status.st_ino)
        if here in above:
            return
        with os.scandir(folder) as entries:
            for entry in entries:
                if _ignored(entry.name):
                    continue
                if entry.is_dir():
                    yield from _below(entry.path, f"{prefix}{entry.name}/", above | {here})
                elif _is_image(entry.name):
                    if not entry.is_file():
                        raise MulkiError(f"{entry.path}: this is no file, or a link that leads nowhere")
                    yield prefix + entry.name
    except OSError as error:
        raise _unreadable(folder, error) from error


def same_name(folder: str) -> str:
    """A folder's name as it is compared: some systems take accents apart from their letters."""
    return unicodedata.normalize("NFC", folder)


def _ignored(name: str) -> bool:
    return name.startswith(".") or name in _NOT_OURS


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not _ignored(name)


def _unreadable(path: str, error: OSError) -> MulkiError:
    return MulkiError(f"{error.filename or path}: cannot be read: {error.strerror or error}")
