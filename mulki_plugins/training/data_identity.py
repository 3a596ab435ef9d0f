"""Whether a stream's images are those of another time: their files' names, sizes, contents or times, as short hashes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mulki_plugins.streams.task import TaskStream

READ = 2**26
"""Bytes: so much of a task's part is read whole; of more, the files' times stand for their contents."""
HASHED = 2**28
"""Bytes: so much of an array is hashed whole; of more, rows at even distances."""
ROWS = 1024

Marks = dict[str, dict[str, dict[str, str]]]
"""Of each task and part what its images are recognised by."""


def marks_of(stream: TaskStream) -> Marks:
    """Of each task's `train` and `test` the marks of its files, or of its array; empty where neither is known."""
    return {task.name: {"train": _marks(task.train), "test": _marks(task.test)} for task in stream.tasks}


def changes(before: Mapping[str, Any], now: Marks) -> list[str]:
    """What has changed, a line for each task and part. A mark that was not noted before is no change."""
    found = []
    for task, parts in now.items():
        for part, marks in parts.items():
            old = before.get(task, {}).get(part, {})
            kinds = [kind for kind in marks if kind in old and old[kind] != marks[kind]]
            if kinds:
                found.append(f"task {task}: its {'training' if part == 'train' else 'test'} images {_said(kinds)}")
    return found


def _said(kinds: Sequence[str]) -> str:
    if "names" in kinds:
        return "are other files, or in another order"
    if kinds == ["times"]:
        return "were written since, or copied (of a copy nothing has changed)"
    return "have other contents"


def _marks(images: Any) -> dict[str, str]:
    paths = _paths(images)
    if paths is not None:
        return _of_files(paths, str(getattr(images, "root", None) or getattr(images, "folder", "")))
    for name in ("images", "pixels", "data"):
        array = getattr(images, name, None)
        if isinstance(array, np.ndarray) and array.ndim and array.dtype != object:
            return {"contents": _hash(_rows(array, getattr(images, "places", None)))}
    return {}


def _paths(images: Any) -> list[str] | None:
    """The files in their order, of data sets that say them as ours or as torchvision's do."""
    if callable(getattr(images, "path", None)):
        return [os.fspath(images.path(i)) for i in range(len(images))]
    samples = getattr(images, "samples", None)
    if isinstance(samples, list) and samples and all(isinstance(s, tuple) and isinstance(s[0], str) for s in samples):
        return [sample[0] for sample in samples]
    return None


def _of_files(paths: Sequence[str], root: str) -> dict[str, str]:
    stats = [_stat(path) for path in paths]
    found = {
        "names": _hash(path.removeprefix(root).encode("utf-8", "surrogateescape") for path in paths),
        "sizes": _hash(str(size).encode() for size, _ in stats),
    }
    if sum(size for size, _ in stats) <= READ:
        return {**found, "contents": _hash(map(_contents, paths))}
    return {**found, "times": _hash(str(time).encode() for _, time in stats)}


def _stat(path: str) -> tuple[int, int]:
    """Size and time of a file; of one that is gone, none."""
    try:
        stat = os.stat(path)
    except OSError:
        return -1, 0
    return stat.st_size, stat.st_mtime_ns


def _contents(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(READ)
    except OSError:
        return b""


def _rows(array: Any, places: Any) -> Iterator[bytes]:
    """The rows that are meant, in their order."""
    order = np.arange(len(array)) if places is None else np.asarray(places)
    size = int(array.nbytes / max(1, len(array)) * len(order))
    order = order[:: 1 + size // HASHED]
    yield f"{array.dtype} {array.shape[1:]} {len(order)}".encode()
    for first in range(0, len(order), ROWS):
        yield np.ascontiguousarray(array[order[first : first + ROWS]]).tobytes()


def _hash(pieces: Iterator[bytes]) -> str:
    result = hashlib.blake2b(digest_size=6)
    for piece in pieces:
        result.update(hashlib.blake2b(piece, digest_size=16).digest())
    return result.hexdigest()
