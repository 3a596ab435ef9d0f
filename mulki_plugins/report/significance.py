"""Confidence intervals and tests between strategies: pure functions of right and wrong answers, and of values per seed.

The unit of the bootstrap is a test image: it is drawn within its task, once for all strategies and all rows of the matrix, so
that strategies are compared on the same images. Seeds are drawn too where there are several.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import numpy as np
from attrs import frozen
from numpy.typing import NDArray
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 10_000
ENOUGH_STREAMS, ENOUGH_STRATEGIES = 5, 3
"""Fewer make no critical-difference diagram: Friedman's statistic is then far from the distribution it is compared with."""
HIGHER_IS_BETTER = {"transfer": True, "average": True, "last": True, "forgetting": False}
"""The metrics that can be computed from a resampled matrix."""
_SEED = 20_241_110
_ROUNDING = 1e-9
"""Percentage points: smaller differences come from rounding."""
_CHUNK = 2**22
"""Drawn images, or cells of resampled matrices, held at once."""

Floats = NDArray[np.float64]
Rights = Sequence[NDArray[np.bool_]]
"""A run's answers: for each task an array [rows of the matrix, test images], whether the answer was right."""


@frozen
class Test:
    """Two strategies compared: the difference of their means, its confidence interval, and a two-sided p-value."""

    difference: float
    low: float
    high: float
    p: float
    method: str

    def reversed(self) -> Test:
        """The same test with the two strategies exchanged."""
        return Test(-self.difference, -self.high, -self.low, self.p, self.method)


# resampled metrics


def resample_metrics(runs: Sequence[Rights], resamples: int = RESAMPLES) -> dict[str, Floats]:
    """For each metric an array [runs, resamples]: its values when each task's test images are drawn anew, with replacement.

    runs: the answers of runs on the same test images, for T ≥ 2 tasks. All runs get the same drawn images. Forgetting contains
    a maximum, which drawing anew raises, so that its values are moved to the mean that the run itself has.
    ValueError if the runs differ in their numbers of tasks or images.
    """
    sizes = [task.shape[1] for task in runs[0]]
    if any(
        [task.shape != (len(sizes), n) for task, n in zip(run, sizes, strict=True)] != [False] * len(sizes)
        for run in runs
    ):
        raise ValueError("expected runs with the same tasks and test images, and a row for each task")
    stacked = [np.concatenate([run[j] for run in runs]).astype(np.float32).T for j in range(len(sizes))]
    generators = [np.random.default_rng([_SEED, j]) for j in range(len(sizes))]
    values: dict[str, list[Floats]] = {name: [] for name in HIGHER_IS_BETTER}
    step = max(1, _CHUNK // max(*sizes, len(runs) * len(sizes) ** 2))
    for first in range(0, resamples, step):
        count = min(step, resamples - first)
        cells = np.empty((count, len(runs), len(sizes), len(sizes)))
        for j, (right, generator) in enumerate(zip(stacked, generators, strict=True)):
            drawn = _draw_counts(generator, count, sizes[j])
            cells[:, :, :, j] = (100 / sizes[j] * (drawn @ right)).reshape(count, len(runs), len(sizes))
        for name, chunk in matrix_metrics(cells).items():
            values[name].append(chunk.T)
    drawn_anew = {name: np.concatenate(chunks, axis=1) for name, chunks in values.items()}
    own = np.stack([100 * task.mean(1).reshape(len(runs), -1) for task in map(np.transpose, stacked)], axis=-1)
    forgetting = drawn_anew["forgetting"]
    forgetting += (matrix_metrics(own)["forgetting"] - forgetting.mean(1))[:, None]
    return drawn_anew


def _draw_counts(generator: np.random.Generator, resamples: int, images: int) -> NDArray[np.float32]:
    """[resamples, images]: how often each image is drawn."""
    drawn = generator.integers(images, size=(resamples, images), dtype=np.uint32)
    drawn += (np.arange(resamples, dtype=np.uint32) * np.uint32(images))[:, None]
    return np.bincount(drawn.ravel(), minlength=resamples * images).reshape(resamples, images).astype(np.float32)


def matrix_metrics(cells: Floats) -> dict[str, Floats]:
    """Transfer, Average, Last and Forgetting of many matrices at once. cells: [..., T, T] in percent, T ≥ 2."""
    tasks = cells.shape[-1]
    before = [cells[..., :j, j].mean(-1) for j in range(1, tasks)]
    fallen = [cells[..., j:, j].max(-1) - cells[..., -1, j] for j in range(tasks - 1)]
    return {
        "transfer": np.mean(before, axis=0),
        "average": cells.mean((-1, -2)),
        "last": cells[..., -1, :].mean(-1),
        "forgetting": np.mean(fallen, axis=0),
    }


def resample_mean(values: Floats, seeds: Sequence[int]) -> Floats:
    """[resamples]: the mean over seeds of a metric's resampled values [seeds, resamples], with the seeds drawn anew too.

    The deviation from the mean is widened by √(n / (n − 1)): n drawn seeds vary too little by that factor (Hesterberg, 2015,
    arXiv 1411.5279). Strategies with the same seeds get the same drawn seeds, so that they are compared seed by seed.
    """
    n = len(seeds)
    mean = values.mean(0)
    if n == 1:
        return np.asarray(mean)
    generator = np.random.default_rng([_SEED, *seeds])
    drawn = generator.integers(n, size=(n, values.shape[1]))
    again = np.take_along_axis(values, drawn, axis=0).mean(0)
    return np.asarray(mean + np.sqrt(n / (n - 1)) * (again - mean))


def interval(resampled: Floats) -> tuple[float, float]:
    """The percentile interval of resampled values."""
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(resampled, [tail, 100 - tail])
    return float(low), float(high)


# tests of two strategies


def bootstrap_test(difference: float, resampled: Floats) -> Test:
    """Test whether a difference is 0, by the share of resampled differences that lie as far from it as it lies from 0.

    p ≥ 1 / (resamples + 1), and 1 for a difference of 0.
    """
    low, high = interval(resampled)
    as_far = np.abs(resampled - difference) >= abs(difference) - _ROUNDING
    return Test(difference, low, high, float((1 + as_far.sum()) / (1 + len(resampled))), "bootstrap over images")


def seeds_test(a: Mapping[int, float], b: Mapping[int, float]) -> Test | None:
    """Student's t test of two strategies' values by seed: paired if the seeds are the same, else Welch's.

    None with fewer than two seeds of either, and where different means have no spread at all: no p-value would be honest.
    """
    if min(len(a), len(b)) < 2:
        return None
    paired = sorted(a) == sorted(b)
    x, y = (np.array([values[seed] for seed in sorted(values)], dtype=np.float64) for values in (a, b))
    method = "paired t test over seeds" if paired else "Welch's t test over seeds"
    difference = float(x.mean() - y.mean())
    spread = np.ptp(x - y) if paired else max(np.ptp(x), np.ptp(y))
    if spread < _ROUNDING:  # the statistic is infinite, or 0/0
        return Test(0.0, 0.0, 0.0, 1.0, method) if abs(difference) < _ROUNDING else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # values so close that their differences lose digits
        tested = stats.ttest_rel(x, y) if paired else stats.ttest_ind(x, y, equal_var=False)
        bounds = tested.confidence_interval(CONFIDENCE)
    return Test(difference, float(bounds.low), float(bounds.high), float(tested.pvalue), method)


def seeds_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Student's interval of the mean of values of several seeds; None with fewer than two."""
    if len(values) < 2:
        return None
    mean, error = float(np.mean(values)), float(stats.sem(values))
    reach = float(stats.t.ppf(0.5 + CONFIDENCE / 2, len(values) - 1)) * error
    return mean - reach, mean + reach


def holm(p: Sequence[float]) -> list[float]:
    """p-values corrected for their number by Holm's step-down method (Holm, 1979), in the given order."""
    corrected, highest = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        highest = max(highest, min(1.0, (len(p) - rank) * p[i]))
        corrected[i] = highest
    return corrected


# many streams


@frozen
class Ranking:
    """Strategies ranked over streams: mean ranks (1 is best), Friedman's p-value, and Nemenyi's critical difference."""

    names: list[str]
    ranks: list[float]
    p: float
    critical_difference: float
    streams: int

    def cliques(self) -> list[tuple[int, int]]:
        """The longest stretches of strategies, by rank, that lie within the critical difference: first and last index."""
        stretches: list[tuple[int, int]] = []
        for i, rank in enumerate(self.ranks):
            last = max(j for j, other in enumerate(self.ranks) if other - rank <= self.critical_difference)
            if last > i and (not stretches or last > stretches[-1][1]):
                stretches.append((i, last))
        return stretches


def rank_strategies(values: Mapping[str, Sequence[float]], higher_is_better: bool = True) -> Ranking | None:
    """Rank strategies by a metric over streams (Demšar, 2006, JMLR 7): best first. Tied strategies share their mean rank.

    values: for each strategy one value per stream. None with fewer than ENOUGH_STREAMS streams or ENOUGH_STRATEGIES.
    """
    names = list(values)
    table = np.array([values[name] for name in names], dtype=np.float64)
    if len(names) < ENOUGH_STRATEGIES or table.shape[1] < ENOUGH_STREAMS:
        return None
    ranks = stats.rankdata(-table if higher_is_better else table, axis=0).mean(1)
    p = 1.0 if (np.ptp(table, axis=0) == 0).all() else float(stats.friedmanchisquare(*table).pvalue)
    k, n = table.shape
    quantile = float(stats.studentized_range.ppf(CONFIDENCE, k, np.inf)) / np.sqrt(2)
    order = sorted(range(k), key=lambda i: (ranks[i], names[i]))
    return Ranking(
        [names[i] for i in order],
        [float(ranks[i]) for i in order],
        p,
        float(quantile * np.sqrt(k * (k + 1) / (6 * n))),
        n,
    )
