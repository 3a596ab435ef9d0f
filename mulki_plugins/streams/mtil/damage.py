"""Whether image files are whole: a look at both ends of each, or the decoding of all."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from mulki_plugins.errors import UnreadableImage
from mulki_plugins.streams.mtil.contents import Images
from mulki_plugins.streams.mtil.images import FileImages, decoded

TAIL = 1 << 16
"""Bytes at a file's end in which the mark of the end is looked for: cameras and web sites append to it."""

_ENDS = {
    b"\xff\xd8\xff": (b"\xff\xd9", "JPEG"),
    b"\x89PNG\r\n\x1a\n": (b"IEND", "PNG"),
    b"GIF8": (b";", "GIF"),
    b"BM": (b"", "BMP"),
    b"RIFF": (b"", "WebP"),
    b"II*\x00": (b"", "TIFF"),
    b"MM\x00*": (b"", "TIFF"),
    b"P5": (b"", "PGM"),
    b"P6": (b"", "PPM"),
}
"""How a file begins: what must stand near its end, and what it is called."""


def damaged(parts: Iterable[Images], decode: bool) -> Iterator[str]:
    """What is wrong with image files, each with its path.

    A look finds what is empty, cut off or no image at all; decoding, in all processors, finds what else Pillow stumbles over.
    """
    paths = (part.path(i) for part in parts if isinstance(part, FileImages) for i in range(len(part)))
    if not decode:
        yield from (problem for path in paths if (problem := cut_off(path)))
        return
    listed = list(paths)
    if not listed:
        return
    with ProcessPoolExecutor(
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None, get_context("spawn")
    ) as pool:
        yield from (problem for problem in pool.map(undecodable, listed, chunksize=64) if problem)


def cut_off(path: str) -> str:
    """What a look at both ends of an image file says; nothing where it is fine."""
    try:
        with open(path, "rb") as file:
            head = file.read(16)
            size = file.seek(0, os.SEEK_END)
            for begin, (end, kind) in _ENDS.items():
                if head.startswith(begin):
                    file.seek(max(0, size - TAIL))
                    return (
                        ""
                        if end in file.read()
                        else f"{path}: this {kind} image is cut off: the mark of its end is missing"
                    )
    except OSError as error:
        return f"{path}: {error.strerror}"
    return f"{path}: this is no image" if size else f"{path}: this image is empty"


def undecodable(path: str) -> str:
    """What decoding an image file says; nothing where it is fine."""
    try:
        decoded(path)
    except UnreadableImage as error:
        return error.message
    return ""
