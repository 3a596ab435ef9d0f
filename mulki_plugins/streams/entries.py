"""The entries of folders: the walk through all of them, which are images, and which are an operating system's own."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Iterable, Iterator

_NO_DECODER = ("BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "PDF", "WMF")
"""Formats that Pillow recognises and cannot decode, or only by starting another program."""
_CODECS = {"AVIF": "avif", "JPEG": "jpg", "JPEG2000": "jpg_2000", "MPO": "jpg", "WEBP": "webp"}
"""Formats whose codec a build of Pillow may lack."""
_HEIF = (".heic", ".heics", ".heif", ".heifs", ".hif")
_PICTURES = (
    *_HEIF, ".ai", ".arw", ".avif", ".avifs", ".cr2", ".cr3", ".dcm", ".dng", ".eps", ".jp2", ".jpg", ".jpeg", ".jxl", ".jxr",
    ".nef", ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".svg", ".webp", ".xcf",
)  # fmt: skip
"""Suffixes of pictures, whether or not Pillow reads them."""
_SYSTEM = frozenset({
    "$recycle.bin", "#recycle", "@eadir", "@recycle", "@sharebin", "@tmp", "__macosx", "__pycache__", "found.000", "lost+found",
    "network trash folder", "system volume information", "temporary items", "thumbs.db", "ehthumbs.db", "ehthumbs_vista.db",
    "desktop.ini", "icon\r",
})  # fmt: skip
"""Folders and files that operating systems make for themselves, in lower case."""

Entry = tuple[str, "os.DirEntry[str]"]
"""A path relative to the folder of the walk, with `/`, and the entry itself."""


def walk(folder: str, prefix: str = "", parents: frozenset[tuple[int, int]] = frozenset()) -> Iterator[Entry]:
    """All files and folders below a folder, unsorted, without hidden and system entries; links are followed, circles are not.

    OSError if a folder cannot be read.
    """
    status = os.stat(folder)
    here = (status.st_dev, status.st_ino)
    if here in parents:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_system(entry.name):
                continue
            path = prefix + entry.name
            yield path, entry
            if entry.is_dir():
                yield from walk(entry.path, f"{path}/", parents | {here})


def is_image(name: str) -> bool:
    """Whether a file's name has the suffix of a format that the installed Pillow decodes, in either case."""
    return name.lower().endswith(suffixes())


def is_picture(name: str) -> bool:
    """Whether a file's name has a picture's suffix, even one that Pillow does not decode, such as a camera's raw format."""
    return name.lower().endswith(_PICTURES) or is_image(name)


def is_system(name: str) -> bool:
    """Whether a file or folder is hidden, or made by an operating system or an archiver for itself."""
    return name.startswith(".") or name.lower() in _SYSTEM


@functools.cache
def suffixes() -> tuple[str, ...]:
    """The suffixes of image files, each with its dot, in lower case."""
    from PIL import Image, features

    register_openers()
    Image.init()

    def decodes(kind: str) -> bool:
        known = kind in Image.OPEN or kind == "MPO"  # an MPO is opened as a JPEG
        return known and kind not in _NO_DECODER and (kind not in _CODECS or bool(features.check(_CODECS[kind])))

    return tuple(sorted(suffix for suffix, kind in Image.registered_extensions().items() if decodes(kind)))


@functools.cache
def register_openers() -> None:
    """Let Pillow read phones' HEIC if the package pillow-heif is installed."""
    try:
        importlib.import_module("pillow_heif").register_heif_opener()
    except (ImportError, OSError):  # not installed, or its library is missing
        return


def describe_others(files: Iterable[str]) -> str:
    """Files that are not images, by suffix, with advice: `10 .heic (such as cat/1.heic), 2 .txt (...)`; empty for no files."""
    groups: dict[str, list[str]] = {}
    for file in files:
        groups.setdefault(os.path.splitext(file)[1].lower(), []).append(file)
    kinds = sorted(groups, key=lambda kind: (not is_picture(kind), -len(groups[kind]), kind))
    counts = [f"{len(groups[k]):,} {k or 'without a suffix'} (such as {min(groups[k])})" for k in kinds[:6]]
    if rest := sum(len(groups[kind]) for kind in kinds[6:]):
        counts.append(f"{rest:,} of other kinds")
    hints = []
    if any(kind in _HEIF for kind in kinds):
        hints.append("to read .heic: pip install pillow-heif")
    if others := [kind for kind in kinds if is_picture(kind) and kind not in _HEIF]:
        hints.append(f"save {', '.join(others[:6])} as .jpg or .png")
    if "" in groups:
        hints.append("an image needs a suffix, such as .jpg")
    return "; ".join([", ".join(counts), *hints])
