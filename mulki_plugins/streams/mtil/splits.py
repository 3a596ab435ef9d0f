"""Which images train and which test, where the data set itself does not say; and a few of each class."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

SEED = 42


def sizes_of_random_split(n: int) -> tuple[int, int]:
    """Training and test images of n: 80 % rounded down, and the rest."""
    train = int(0.8 * n)
    return train, n - train


def random_split(n: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Places of training and test images: torch's `random_split` into 80 % and the rest with seed 42, as ZSCL's code draws it."""
    import torch

    places: NDArray[Any] = torch.randperm(n, generator=torch.Generator().manual_seed(SEED)).numpy()
    train, _ = sizes_of_random_split(n)
    return places[:train].astype(np.int64), places[train:].astype(np.int64)


def four_fifths(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Places of 80 % of each class's images (a fifth, rounded, is left out), in the data set's order."""
    order = np.random.RandomState(SEED).permutation(len(labels))
    left = [places[: round(0.2 * len(places))] for places in _by_class(labels, order)]
    keep = np.ones(len(labels), dtype=bool)
    keep[np.concatenate(left) if left else []] = False
    return np.flatnonzero(keep)


def few(labels: NDArray[np.int64], shots: int) -> NDArray[np.int64]:
    """Places of `shots` images of each class, drawn once with a fixed seed, in the data set's order; of a smaller class all.

    Five are among sixteen of the same data.
    """
    order = np.random.RandomState(SEED).permutation(len(labels))
    taken = [places[:shots] for places in _by_class(labels, order)]
    return np.sort(np.concatenate(taken)) if taken else np.zeros(0, dtype=np.int64)


def _by_class(labels: NDArray[np.int64], order: NDArray[Any]) -> list[NDArray[np.int64]]:
    """The places of each class's images, in that order."""
    by_label = order[np.argsort(labels[order], kind="stable")].astype(np.int64)
    starts = np.flatnonzero(np.diff(labels[by_label], prepend=-1)) if len(labels) else np.zeros(0, dtype=np.int64)
    return np.split(by_label, starts[1:]) if len(labels) else []
