"""Whether image files are whole: a look at both ends of each, or the decoding of all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

from mulki_plugins.errors import MulkiError
from mulki_plugins.streams.mtil.images import decoded

Opens = Callable[[str], Any]
"""Decodes an image file; MulkiError where it cannot."""

_WHOLE = ((b"\xff\xd8\xff", b"\xff\xd9"), (b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"), (b"GIF8", b";"))
"""How a JPEG, a PNG and a GIF begin and end. Cameras and web sites append to some; those are decoded."""


def damaged(parts: Iterable[Any], decode: bool, opens: Opens = decoded) -> Iterator[str]:
    """What is wrong with the image files of those parts that have files, each with its path.

    A look finds what is empty, cut off or no image at all; a file that does not end as its kind does is decoded to be sure.
    Decoding all, in all processors, finds what else Pillow stumbles over.
    """
    paths = (part.path(i) for part in parts if hasattr(part, "path") for i in range(len(part)))
    if not decode:
        yield from (problem for path in paths if (problem := cut_off(path, opens)))
        return
    listed = list(paths)
    if not listed:
        return
    with ProcessPoolExecutor(
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None, get_context("spawn")
    ) as pool:
        yield from (problem for problem in pool.map(partial(undecodable, opens=opens), listed, chunksize=64) if problem)


def cut_off(path: str, opens: Opens = decoded) -> str:
    """What a look at both ends of an image file says; nothing where it is fine."""
    try:
        with open(path, "rb") as file:
            head = file.read(16)
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 16))
            tail = file.read()
    except OSError as error:
        return f"{path}: {error.strerror}"
    if not size:
        return f"{path}: this image is empty"
    if any(head.startswith(begin) and tail.endswith(end) for begin, end in _WHOLE):
        return ""
    return undecodable(path, opens)


def undecodable(path: str, opens: Opens = decoded) -> str:
    """What decoding an image file says; nothing where it is fine."""
    try:
        opens(path)
    except MulkiError as error:
        return error.message
    return ""
