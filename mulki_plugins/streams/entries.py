"""Which files in a folder are images, and what operating systems leave behind; Pillow is imported when it is first asked."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Iterable

_NO_DECODER = ("BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "PDF", "WMF")
"""Formats that Pillow recognises and cannot decode, or only by starting another program."""
_CODECS = {"AVIF": "avif", "JPEG": "jpg", "JPEG2000": "jpg_2000", "MPO": "jpg", "WEBP": "webp"}
"""Formats whose codec a build of Pillow may lack."""
_HEIF = (".heic", ".heics", ".heif", ".heifs", ".hif")
_PICTURES = (
    *_HEIF, ".ai", ".arw", ".avif", ".avifs", ".cr2", ".cr3", ".dcm", ".dng", ".eps", ".jp2", ".jpg", ".jpeg", ".jxl", ".jxr",
    ".nef", ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".svg", ".webp", ".xcf",
)  # fmt: skip
"""Of pictures, whether or not Pillow reads them."""
_SYSTEM_FOLDERS = (
    "$recycle.bin", "#recycle", "@eadir", "@recycle", "@sharebin", "@tmp", "__macosx", "__pycache__", "found.000", "lost+found",
    "network trash folder", "recycled", "recycler", "system volume information", "temporary items",
)  # fmt: skip
_SYSTEM_FILES = ("thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r")


def is_image(name: str) -> bool:
    """Whether a file's name ends as those that the installed Pillow decodes, in lower or upper case."""
    return name.lower().endswith(suffixes())


def is_picture(name: str) -> bool:
    """Whether a file's name ends as a picture's, even one that Pillow does not decode, such as a phone's or a camera's."""
    return name.lower().endswith(_PICTURES) or is_image(name)


def is_system(name: str) -> bool:
    """Whether a file or folder is hidden, or one that operating systems and archivers make for themselves."""
    return name.startswith(".") or name.lower() in (*_SYSTEM_FOLDERS, *_SYSTEM_FILES)


@functools.cache
def suffixes() -> tuple[str, ...]:
    """What the names of image files end with, each with its dot, in lower case."""
    from PIL import Image, features

    register_openers()
    Image.init()

    def decodes(kind: str) -> bool:
        known = kind in Image.OPEN or kind == "MPO"  # an MPO is opened as a JPEG
        return known and kind not in _NO_DECODER and (kind not in _CODECS or bool(features.check(_CODECS[kind])))

    return tuple(sorted(suffix for suffix, kind in Image.registered_extensions().items() if decodes(kind)))


@functools.cache
def register_openers() -> None:
    """Let Pillow read phones' HEIC where the package pillow-heif is installed."""
    try:
        importlib.import_module("pillow_heif").register_heif_opener()
    except (ImportError, OSError):  # not installed, or its library is missing
        return


def kinds_of(files: Iterable[str]) -> str:
    """Files that are no images by their suffixes, with what to do: `10 .heic (such as cat/1.heic), 2 .txt (...)`; or nothing."""
    found: dict[str, list[str]] = {}
    for file in files:
        found.setdefault(os.path.splitext(file)[1].lower(), []).append(file)
    kinds = sorted(found, key=lambda kind: (not is_picture(kind), -len(found[kind]), kind))
    said = [f"{len(found[k]):,} {k or 'without a suffix'} (such as {min(found[k])})" for k in kinds[:6]]
    if rest := sum(len(found[kind]) for kind in kinds[6:]):
        said.append(f"{rest:,} of other kinds")
    hints = []
    if any(kind in _HEIF for kind in kinds):
        hints.append("to read .heic: pip install pillow-heif")
    if others := [kind for kind in kinds if is_picture(kind) and kind not in _HEIF]:
        hints.append(f"save {', '.join(others[:6])} as .jpg or .png")
    if "" in found:
        hints.append("an image needs a suffix, such as .jpg")
    return "; ".join([", ".join(said), *hints])
