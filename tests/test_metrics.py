"""The metrics against published tables, a plain loop, and what must hold for any matrix."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from mulki_plugins.metrics import average, forgetting, last, transfer, wilson_interval

PUBLISHED = json.loads((Path(__file__).parent / "data" / "published_matrices.json").read_text())["matrices"]
METRICS = {"transfer": transfer, "average": average, "last": last, "forgetting": forgetting}


@pytest.mark.parametrize("table", PUBLISHED, ids=lambda t: f"{t['method']}-{t['order']}")
@pytest.mark.parametrize("name", ["transfer", "average", "last"])
def test_published_numbers(table, name):
    assert METRICS[name](table["matrix"]) == pytest.approx(table["published"][name], abs=0.05)


def by_loops(a):
    """The definitions, literally, with 1-based tasks."""
    n = len(a)
    cell = {(i, j): float(a[i - 1][j - 1]) for i in range(1, n + 1) for j in range(1, n + 1)}
    columns = [sum(cell[i, j] for i in range(1, j)) / (j - 1) for j in range(2, n + 1)]
    falls = [max(cell[i, j] for i in range(j, n + 1)) - cell[n, j] for j in range(1, n)]
    return {
        "transfer": sum(columns) / len(columns),
        "average": sum(cell.values()) / n**2,
        "last": sum(cell[n, j] for j in range(1, n + 1)) / n,
        "forgetting": sum(falls) / len(falls),
    }


@pytest.mark.parametrize("tasks", [2, 3, 11])
def test_definitions(tasks):
    a = np.random.default_rng(tasks).uniform(0, 100, (tasks, tasks))
    for name, expected in by_loops(a).items():
        assert METRICS[name](a) == pytest.approx(expected)


def test_a_constant_matrix():
    assert [metric(np.full((4, 4), 37.5)) for metric in METRICS.values()] == [37.5, 37.5, 37.5, 0.0]


def test_transfer_looks_only_above_the_diagonal_and_is_a_mean_of_means():
    a = [[0, 90, 30], [0, 0, 60], [0, 0, 0]]
    assert transfer(a) == pytest.approx((90 + 45) / 2)


def test_forgetting_is_never_negative_and_zero_where_nothing_falls():
    assert forgetting([[50, 0], [60, 70]]) == 0
    assert forgetting([[80, 0], [60, 70]]) == 20


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS.keys())
@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ([[1.0]], "at least 2"),
        ([], "T x T"),
        ([1, 2, 3], "shape"),
        ([[1, 2, 3], [4, 5, 6]], "shape"),
        ([[1, 2], [3]], "T x T"),
        ([[1, float("-inf")], [3, 4]], "task 2 after task 1"),
        ([[1, 2], [3, float("inf")]], "finite"),
        ([["a", 2], [3, 4]], "numbers"),
        (None, "T x T"),
    ],
)
def test_bad_matrices(metric, bad, why):
    with pytest.raises(ValueError, match=why):
        metric(bad)


def test_a_metric_needs_only_its_own_part_of_the_matrix():
    whole = np.random.default_rng(0).uniform(0, 100, (4, 4))
    gaps = {"transfer": (2, 0), "last": (1, 3), "forgetting": (0, 3)}
    for name, gap in gaps.items():
        matrix = whole.copy()
        matrix[gap] = np.nan
        assert METRICS[name](matrix) == pytest.approx(by_loops(whole)[name])
        with pytest.raises(ValueError, match=f"task {gap[1] + 1} after task {gap[0] + 1}"):
            average(matrix)
    with pytest.raises(ValueError, match="task 4 after task 1"):
        transfer(matrix)


@pytest.mark.parametrize(("right", "images"), [(0, 10), (7, 10), (10, 10), (231, 320), (1, 1), (0, 1), (199, 960)])
def test_wilson_solves_its_equation(right, images):
    """Each bound p satisfies |p̂ − p| = z √(p (1 − p) / n)."""
    low, high = wilson_interval(right, images)
    share, z = right / images, 1.959963984540054
    for bound in (low / 100, high / 100):
        assert abs(share - bound) == pytest.approx(z * math.sqrt(bound * (1 - bound) / images), abs=1e-9)
    assert 0 <= low <= 100 * share <= high <= 100


@pytest.mark.parametrize(("right", "images"), [(0, 0), (2, 1), (-1, 5)])
def test_wilson_needs_images(right, images):
    with pytest.raises(ValueError, match="at least 1 image"):
        wilson_interval(right, images)
