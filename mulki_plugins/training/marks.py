"""Marks of a stream's images: short hashes that show, before a run is resumed, whether its images have changed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mulki_plugins.streams.task import TaskStream

Marks = dict[str, dict[str, dict[str, str]]]
"""Short hashes by which a task's training and test images are recognised."""

READ = 2**26
"""Bytes: a task's files are read whole up to this size; beyond it their times stand for their contents."""

HASHED = 2**28
"""Bytes: an array is hashed whole up to this size; beyond it, rows at even distances."""

ROWS = 1024


def marks_of(stream: TaskStream) -> Marks:
    """The marks of each task's `train` and `test` images, from their files or their array; empty if neither is known."""
    marks = {task.name: {"train": _marks(task.train), "test": _marks(task.test)} for task in stream.tasks}
    return marks | {task.name: {"test": _marks(task.test)} for task in stream.held_out}


def marks_of_reference(reference: TaskStream | None) -> Marks:
    """The marks of the reference images, under names that no task has."""
    tasks = reference.tasks if reference is not None else ()
    return {f"{task.name} (reference)": {"train": _marks(task.train)} for task in tasks}


def image_changes(before: Mapping[str, Any], now: Marks) -> list[str]:
    """A line for each task's training or test images that have changed. A mark that was not recorded is no change."""
    lines = []
    for task, parts in now.items():
        for part, marks in parts.items():
            old = before.get(task, {}).get(part, {})
            kinds = [kind for kind in marks if kind in old and old[kind] != marks[kind]]
            if kinds:
                lines.append(f"task {task}: its {'training' if part == 'train' else 'test'} images {_how(kinds)}")
    return lines


def _how(kinds: Sequence[str]) -> str:
    if "names" in kinds:
        return "are other files, or in another order"
    if kinds == ["times"]:
        return "were written since, or copied (a copy changes nothing)"
    return "have other contents"


def _marks(images: Any) -> dict[str, str]:
    paths = paths_of(images)
    if paths is not None:
        return _marks_of_files(paths, str(getattr(images, "root", None) or getattr(images, "folder", "")))
    for name in ("images", "pixels", "data"):
        array = getattr(images, name, None)
        if isinstance(array, np.ndarray) and array.ndim and array.dtype != object:
            return {"contents": _short_hash(_rows(array, getattr(images, "places", None)))}
    return {}


def paths_of(images: Any) -> list[str] | None:
    """The files in their order, of data sets that name them as ours or as torchvision's do; None for others."""
    if callable(getattr(images, "path", None)):
        return [os.fspath(images.path(i)) for i in range(len(images))]
    samples = getattr(images, "samples", None)
    if isinstance(samples, list) and samples and all(isinstance(s, tuple) and isinstance(s[0], str) for s in samples):
        return [sample[0] for sample in samples]
    return None


def _marks_of_files(paths: Sequence[str], root: str) -> dict[str, str]:
    stats = [_stat(path) for path in paths]
    marks = {
        "names": _short_hash(path.removeprefix(root).encode("utf-8", "surrogateescape") for path in paths),
        "sizes": _short_hash(str(size).encode() for size, _ in stats),
    }
    if sum(size for size, _ in stats) <= READ:
        return {**marks, "contents": _short_hash(map(_contents, paths))}
    return {**marks, "times": _short_hash(str(time).encode() for _, time in stats)}


def _stat(path: str) -> tuple[int, int]:
    """Size and time of a file; -1 and 0 if it is gone."""
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
    """The rows at `places`, or all, in their order."""
    order = np.arange(len(array)) if places is None else np.asarray(places)
    size = int(array.nbytes / max(1, len(array)) * len(order))
    order = order[:: 1 + size // HASHED]
    yield f"{array.dtype} {array.shape[1:]} {len(order)}".encode()
    for first in range(0, len(order), ROWS):
        yield np.ascontiguousarray(array[order[first : first + ROWS]]).tobytes()


def _short_hash(pieces: Iterator[bytes]) -> str:
    result = hashlib.blake2b(digest_size=6)
    for piece in pieces:
        result.update(hashlib.blake2b(piece, digest_size=16).digest())
    return result.hexdigest()
