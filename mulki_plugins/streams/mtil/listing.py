"""The files below a folder, whatever order the file system gives them in; kept, since a data set has up to 10⁵ of them."""

from __future__ import annotations

import hashlib
import os
import time
import zipfile
from pathlib import Path

import numpy as np
from attrs import frozen

from mulki_plugins.streams.cache_folder import cache_folder, keep
from mulki_plugins.streams.entries import is_system

DEEPEST = 8
"""Levels of folders; a data set has up to four, and a link to a folder above itself has no end."""
SETTLED = 2.0
"""Seconds after which a folder's time of change says for certain whether it was changed again."""
_VERSION = 4


@frozen
class Listing:
    """Files and folders by their paths below a folder, with `/`, each sorted level by level; nothing hidden."""

    files: tuple[str, ...]
    folders: tuple[str, ...]


def listing(folder: Path) -> Listing:
    """What lies below a folder. Read from the cache where no folder in it was changed since. OSError where it cannot be read."""
    folder = folder.absolute()
    path = cache_folder() / f"listing-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]}.npz"
    if (kept := _kept(path, folder)) is not None:
        return kept
    began = time.time()
    found, changed = walked(folder)
    if max(map(max, changed)) / 1e9 < began - SETTLED:
        columns = {
            "version": np.array(_VERSION), "changed": np.array(changed, dtype=np.int64),
            "files": _column(found.files), "folders": _column(found.folders),
        }  # fmt: skip
        keep(path, lambda file: np.savez(file, **columns))  # type: ignore[arg-type]
    return found


def walked(folder: Path) -> tuple[Listing, list[list[int]]]:
    """What lies below a folder now, and when the folder and each in it was last changed, as `_changed` says."""
    files: list[str] = []
    folders: dict[str, list[int]] = {}
    ahead = [("", 0)]
    top = _changed(os.stat(folder))
    while ahead:
        below, depth = ahead.pop()
        with os.scandir(os.path.join(folder, below)) as entries:
            for entry in entries:
                if is_system(entry.name):
                    continue
                path = f"{below}/{entry.name}" if below else entry.name
                if not entry.is_dir():
                    files.append(path)
                elif depth < DEEPEST:
                    folders[path] = _changed(entry.stat())
                    ahead.append((path, depth + 1))
    ordered = tuple(sorted(folders, key=_levels))
    return Listing(tuple(sorted(files, key=_levels)), ordered), [top, *(folders[path] for path in ordered)]


def _changed(stat: os.stat_result) -> list[int]:
    """When a folder's entries were changed, and its inode, in nanoseconds: a copy may bring the first with it, not the second."""
    return [stat.st_mtime_ns, stat.st_ctime_ns]


def _levels(path: str) -> list[str]:
    return path.split("/")


def _kept(path: Path, folder: Path) -> Listing | None:
    """What the cache says, where it is still true."""
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            if int(file["version"]) != _VERSION:
                return None
            folders = [os.fsdecode(name) for name in file["folders"].tolist()]
            now = [_changed(os.stat(os.path.join(folder, below))) for below in ("", *folders)]
            if now != file["changed"].tolist():
                return None
            return Listing(tuple(os.fsdecode(name) for name in file["files"].tolist()), tuple(folders))
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        zipfile.BadZipFile,
        EOFError,
    ):  # not there, damaged, or of yesterday
        return None


def _column(paths: tuple[str, ...]) -> np.ndarray[tuple[int], np.dtype[np.bytes_]]:
    return np.array([os.fsencode(path) for path in paths], dtype=np.bytes_)
