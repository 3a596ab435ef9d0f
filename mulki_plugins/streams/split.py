"""How a data set's images are divided: into training and test images, and into a few of each class."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

SEED = 42


def random_split_sizes(n: int) -> tuple[int, int]:
    """Numbers of training and test images: 80 % of n, rounded down, and the rest."""
    train = int(0.8 * n)
    return train, n - train


def random_split(n: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of training and test images: torch's `random_split` into 80 % and 20 % with seed 42, as in ZSCL's code."""
    import torch

    order: NDArray[Any] = torch.randperm(n, generator=torch.Generator().manual_seed(SEED)).numpy()
    train, _ = random_split_sizes(n)
    return order[:train].astype(np.int64), order[train:].astype(np.int64)


def four_fifths(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Indices of 80 % of each class's images, sorted: a rounded fifth, drawn with seed 42, is left out."""
    keep = np.ones(len(labels), dtype=bool)
    for indices in _shuffled_by_class(labels):
        keep[indices[: round(0.2 * len(indices))]] = False
    return np.flatnonzero(keep)


def few(labels: NDArray[np.int64], shots: int) -> NDArray[np.int64]:
    """Indices of `shots` images of each class, or all of a smaller class, drawn with seed 42, sorted.

    The same data give nested sets: five shots are among sixteen.
    """
    drawn = [indices[:shots] for indices in _shuffled_by_class(labels)]
    return np.sort(np.concatenate(drawn)) if drawn else np.zeros(0, dtype=np.int64)


def note_few(task: str, class_names: Sequence[str], labels: NDArray[np.int64], shots: int) -> str:
    """A notice if a class has fewer training images than `shots`; else empty. labels: [N], before `few` draws from them."""
    counts = np.bincount(labels, minlength=len(class_names))
    short = np.flatnonzero(counts < shots)
    if not len(short):
        return ""
    return (
        f"note: {task}: {len(short)} of {len(counts)} classes have fewer than {shots} training images, "
        f"such as {class_names[short[0]]!r} with {int(counts[short[0]])}; all of them are used"
    )


def _shuffled_by_class(labels: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """The indices of each class's images, shuffled with seed 42."""
    if not len(labels):
        return []
    order = np.random.RandomState(SEED).permutation(len(labels))
    by_label = order[np.argsort(labels[order], kind="stable")].astype(np.int64)
    starts = np.flatnonzero(np.diff(labels[by_label], prepend=-1))
    return np.split(by_label, starts[1:])


def every_fifth(labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Mask [N] of every fifth image of each class, in their order: validation images."""
    order = np.argsort(labels, kind="stable")
    firsts = np.searchsorted(labels[order], labels[order])
    mask = np.zeros(len(order), dtype=bool)
    mask[order] = (np.arange(len(order)) - firsts) % 5 == 4
    return mask


def split_by_hash(files: Sequence[str], share: float, seed: int) -> tuple[list[str], list[str]]:
    """The files of one class, two or more, as sorted training and test files; `share` of them, at least one, is for the test.

    Files are ranked by a hash of the seed and their path, which begins with the class folder. So the split depends on no
    other class and no machine, and a new file moves at most one of the others.
    """
    ranked = sorted(files, key=lambda file: (_rank(seed, file), file))
    held_out = min(max(int(share * len(files) + 0.5), 1), len(files) - 1)
    return sorted(ranked[held_out:]), sorted(ranked[:held_out])


def _rank(seed: int, file: str) -> bytes:
    text = unicodedata.normalize("NFC", f"{seed}\0{file}")
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
