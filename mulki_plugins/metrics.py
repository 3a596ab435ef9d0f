"""Metrics of the accuracy matrix a, where a[i, j] is the accuracy in percent on task j after training task i.

As defined by the MTIL protocol (Zheng et al., 2023, arXiv 2303.06628). The matrix does not include the zero-shot row.
NaN stands for what was not measured: a metric that needs it raises a ValueError, and the others do without.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


def transfer(matrix: ArrayLike) -> float:
    """Accuracy on tasks before they are learned: the mean over tasks j ≥ 2 of the mean over i < j of a[i, j].

    matrix: [T, T] in percent. ValueError if it is not square, if a number that is needed is NaN, or T < 2.
    """
    return float(transfer_by_task(matrix).mean())


def average(matrix: ArrayLike) -> float:
    """Accuracy over all tasks and all times: the mean of the whole matrix. ValueError as for `transfer`."""
    return float(average_by_task(matrix).mean())


def last(matrix: ArrayLike) -> float:
    """Accuracy over all tasks at the end of the stream: the mean of the last row. ValueError as for `transfer`."""
    return float(last_by_task(matrix).mean())


def transfer_by_task(matrix: ArrayLike) -> NDArray[np.float64]:
    """[T − 1]: for each task j ≥ 2, the mean over i < j of a[i, j]. ValueError as for `transfer`."""
    a = _matrix(matrix, lambda ones: np.triu(ones, 1))
    return np.array([a[:j, j].mean() for j in range(1, len(a))])


def average_by_task(matrix: ArrayLike) -> NDArray[np.float64]:
    """[T]: the mean of each task's column. ValueError as for `transfer`."""
    return np.asarray(_matrix(matrix, lambda ones: ones).mean(0))


def last_by_task(matrix: ArrayLike) -> NDArray[np.float64]:
    """[T]: the last row. ValueError as for `transfer`."""
    return np.asarray(_matrix(matrix, _last_row)[-1])


def forgetting(matrix: ArrayLike) -> float:
    """Fall of each task from its best after it was learned: the mean over j < T of max over i ≥ j of a[i, j] − a[T, j].

    ≥ 0, less is better (Chaudhry et al., 2018, arXiv 1801.10112, with the last row in the maximum). ValueError as for `transfer`.
    """
    a = _matrix(matrix, np.tril)
    return float(np.mean([a[j:, j].max() - a[-1, j] for j in range(len(a) - 1)]))


def incremental(matrix: ArrayLike, images: ArrayLike) -> float:
    """Average incremental accuracy Ā of class-incremental learning: the mean of `incremental_by_step` (arXiv 1611.07725).

    images: [T], the number of test images of each task. ValueError as for `transfer`, or if the numbers do not fit.
    """
    return float(incremental_by_step(matrix, images).mean())


def incremental_last(matrix: ArrayLike, images: ArrayLike) -> float:
    """Accuracy A_B on the test images of all classes after the last step. ValueError as for `incremental`."""
    return float(incremental_by_step(matrix, images)[-1])


def incremental_by_step(matrix: ArrayLike, images: ArrayLike) -> NDArray[np.float64]:
    """[T]: A_b = Σ_{j ≤ b} n_j·a[b, j] / Σ_{j ≤ b} n_j, the accuracy on the n_j test images of each task learned by step b.

    It is that of class-incremental learning if each image is classified among all classes seen so far.
    """
    a = _matrix(matrix, np.tril)
    n = np.asarray(images, dtype=np.float64)
    if n.shape != (len(a),) or not (np.isfinite(n).all() and (n > 0).all()):
        raise ValueError(f"expected the numbers of test images of {len(a)} tasks, got {n.tolist()}")
    return np.array([np.average(a[b, : b + 1], weights=n[: b + 1]) for b in range(len(a))])


def wilson_interval(right: int, images: int) -> tuple[float, float]:
    """The 95 % confidence interval of one accuracy, in percent. ValueError unless 0 ≤ right ≤ images and images ≥ 1.

    Wilson's score interval (p + z²/2n ± z·√(p(1 − p)/n + z²/4n²)) / (1 + z²/n), p = right/n, z = 1.96 (1927, JASA 22(158)).
    """
    if not 0 <= right <= images or not images:
        raise ValueError(f"expected 0 <= right <= images and at least 1 image, got {right} and {images}")
    p, square = right / images, _Z95 * _Z95 / images
    centre = (p + square / 2) / (1 + square)
    half = _Z95 * math.sqrt(p * (1 - p) / images + square / (4 * images)) / (1 + square)
    return (0.0 if right == 0 else 100 * (centre - half)), (100.0 if right == images else 100 * (centre + half))


_Z95 = 1.959963984540054
"""The 97.5 % quantile of the normal distribution."""


def _last_row(ones: NDArray[np.bool_]) -> NDArray[np.bool_]:
    ones[:-1] = False
    return ones


def _matrix(values: Any, needed: Callable[[NDArray[np.bool_]], NDArray[np.bool_]]) -> NDArray[np.float64]:
    """The values as an array. needed: of a [T, T] array of ones, keeps those that the metric needs."""
    try:
        a = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"expected a T x T matrix of numbers: {error}") from error
    if a.ndim != 2 or a.shape[0] != a.shape[1]:
        raise ValueError(f"expected a square T x T matrix, got shape {a.shape}")
    if len(a) < 2:
        raise ValueError(f"expected at least 2 tasks, got {len(a)}")
    wrong = np.isinf(a) | (np.isnan(a) & needed(np.ones(a.shape, dtype=np.bool_)))
    if wrong.any():
        i, j = np.argwhere(wrong)[0]
        raise ValueError(f"expected finite numbers, got {a[i, j]} on task {j + 1} after task {i + 1}")
    return a
