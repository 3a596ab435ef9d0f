"""Intervals and tests against independent computations, and their properties."""

import math

import numpy as np
import pytest

from mulki_plugins import metrics
from mulki_plugins.report.significance import (
    bootstrap_test,
    holm,
    interval,
    matrix_metrics,
    rank_strategies,
    resample_mean,
    resample_metrics,
    seeds_interval,
    seeds_test,
)

TASKS, IMAGES = 4, 300


def draw_run(seed, skill=0.6):
    """A run's answers: [rows, images] for each task."""
    generator = np.random.default_rng(seed)
    return [generator.random((TASKS, IMAGES)) < skill for _ in range(TASKS)]


def measure(run):
    """The accuracy matrix of a run."""
    return np.array([100 * task.mean(1) for task in run]).T


def t_density(x, freedom):
    constant = math.gamma((freedom + 1) / 2) / (math.sqrt(freedom * math.pi) * math.gamma(freedom / 2))
    return constant * (1 + x**2 / freedom) ** (-(freedom + 1) / 2)


def t_tail(t, freedom):
    """The two-sided p-value, by numerical integration of Student's density."""
    x = np.linspace(0, abs(t), 200_001)
    return 1 - 2 * np.trapezoid(t_density(x, freedom), x)


def test_many_matrices_give_the_metrics_of_each():
    cells = np.random.default_rng(0).uniform(0, 100, (5, 2, TASKS, TASKS))
    computed = matrix_metrics(cells)
    assert set(computed) == {"transfer", "average", "last", "forgetting"}
    for name, values in computed.items():
        expected = [[getattr(metrics, name)(cells[i, j]) for j in range(2)] for i in range(5)]
        assert values == pytest.approx(np.array(expected)), name


def test_the_bootstrap_varies_as_much_as_theory_says():
    """Last is a mean of independent shares: its variance is Σ p (1 − p) / n / T²."""
    run = draw_run(1)
    last = resample_metrics([run], 4000)["last"][0]
    shares = measure(run)[-1] / 100
    expected = 100 * math.sqrt(sum(shares * (1 - shares) / IMAGES)) / TASKS
    assert last.std() == pytest.approx(expected, rel=0.05)
    assert last.mean() == pytest.approx(100 * shares.mean(), abs=0.1)
    low, high = interval(last)
    assert high - low == pytest.approx(2 * 1.96 * expected, rel=0.06)


def test_the_bootstrap_agrees_with_a_slow_one_for_a_difference():
    """Forgetting, which is no mean: images are drawn one task and one resample at a time, with another generator."""
    runs = [draw_run(1, 0.6), draw_run(2, 0.65)]
    runs[1] = [np.where(np.arange(IMAGES) % 2, a, b) for a, b in zip(runs[0], runs[1], strict=True)]  # correlated
    fast = resample_metrics(runs, 3000)["forgetting"]
    generator = np.random.RandomState(3)
    slow = []
    for _ in range(3000):
        drawn = [generator.randint(IMAGES, size=IMAGES) for _ in range(TASKS)]
        first, second = ([task[:, places] for task, places in zip(run, drawn, strict=True)] for run in runs)
        slow.append(metrics.forgetting(measure(first)) - metrics.forgetting(measure(second)))
    difference = fast[0] - fast[1]
    assert difference.std() == pytest.approx(np.std(slow), rel=0.06)
    own = metrics.forgetting(measure(runs[0])) - metrics.forgetting(measure(runs[1]))
    around_own = np.array(slow) - np.mean(slow) + own
    assert interval(difference) == pytest.approx(np.percentile(around_own, [2.5, 97.5]), abs=0.25)


def test_forgetting_is_resampled_around_its_own_value():
    """Rows that differ by chance alone: drawing images anew raises the maximum, but not the middle of the interval."""
    run = draw_run(4)
    forgetting = metrics.forgetting(measure(run))
    resampled = resample_metrics([run, draw_run(5)], 1000)["forgetting"][0]
    assert resampled.mean() == pytest.approx(forgetting, rel=1e-5)
    low, high = interval(resampled)
    assert low < forgetting < high


def test_chunks_change_nothing(monkeypatch):
    whole = resample_metrics([draw_run(1)], 50)["average"]
    monkeypatch.setattr("mulki_plugins.report.significance._CHUNK", 7 * IMAGES)
    assert (resample_metrics([draw_run(1)], 50)["average"] == whole).all()


def test_runs_on_different_images_are_refused():
    with pytest.raises(ValueError, match="same tasks and test images"):
        resample_metrics([draw_run(1), [task[:, :-1] for task in draw_run(1)]], 10)


def compare(first, second, metric="last", resamples=2000):
    values = resample_metrics([first, second], resamples)[metric]
    measured = [getattr(metrics, metric)(measure(run)) for run in (first, second)]
    return bootstrap_test(measured[0] - measured[1], values[0] - values[1])


def test_identical_answers_give_p_1():
    test = compare(draw_run(1), draw_run(1))
    assert (test.difference, test.low, test.high, test.p) == (0, 0, 0, 1)


def test_a_clear_difference_gives_a_small_p_and_none_a_large_one():
    assert compare(draw_run(1, 0.8), draw_run(2, 0.6)).p == pytest.approx(1 / 2001)
    weak = compare(draw_run(1, 0.605), draw_run(2, 0.6))
    assert weak.p > 0.05
    assert weak.low < 0 < weak.high


def test_p_agrees_with_the_normal_approximation():
    first, second = draw_run(1, 0.63), draw_run(2, 0.6)
    test = compare(first, second, resamples=8000)
    scores = np.array([a[-1].astype(float) - b[-1] for a, b in zip(first, second, strict=True)])
    z = scores.mean() / (math.sqrt(sum(scores.var(1) / IMAGES)) / TASKS)
    assert test.p == pytest.approx(math.erfc(abs(z) / math.sqrt(2)), rel=0.15)


def test_symmetric_and_deterministic():
    first, second = draw_run(1), draw_run(2, 0.63)
    there, back = compare(first, second), compare(second, first)
    assert back.p == there.p
    assert (back.low, back.high) == pytest.approx((-there.high, -there.low))
    assert there == compare(first, second)
    assert there.reversed().reversed() == there


def test_p_is_uniform_without_a_difference():
    """Of 200 comparisons of equal strategies about 5 % are significant at 0.05."""
    small = [[task[:, :80] for task in draw_run(seed)] for seed in range(400)]
    values = [resample_metrics(small[i : i + 2], 300)["last"] for i in range(0, 400, 2)]
    lasts = [metrics.last(measure(run)) for run in small]
    p = [bootstrap_test(lasts[2 * i] - lasts[2 * i + 1], v[0] - v[1]).p for i, v in enumerate(values)]
    assert 0.01 <= np.mean(np.array(p) < 0.05) <= 0.1


def test_seeds_add_their_spread():
    """Without noise of images, the mean of n seeds varies by s / √n, not by less."""
    levels = np.array([60.0, 62.0, 67.0])
    drawn = resample_mean(np.repeat(levels[:, None], 20_000, axis=1), [0, 1, 2])
    assert drawn.std() == pytest.approx(levels.std(ddof=1) / math.sqrt(3), rel=0.02)
    assert drawn.mean() == pytest.approx(63, abs=0.05)


def test_equal_seeds_are_drawn_together():
    levels = np.repeat(np.array([[60.0], [62.0], [67.0]]), 500, axis=1)
    assert np.ptp(resample_mean(levels + 5, [0, 1, 2]) - resample_mean(levels, [0, 1, 2])) == pytest.approx(0, abs=1e-9)
    assert np.ptp(resample_mean(levels + 5, [0, 1, 3]) - resample_mean(levels, [0, 1, 2])) > 1


def test_the_test_over_equal_seeds_is_paired():
    a, b = {0: 70.0, 1: 72.0, 2: 71.5}, {2: 70.9, 0: 69.0, 1: 71.2}
    test = seeds_test(a, b)
    differences = np.array([a[seed] - b[seed] for seed in a])
    t = differences.mean() / (differences.std(ddof=1) / math.sqrt(3))
    assert test.method.startswith("paired")
    assert test.difference == pytest.approx(differences.mean())
    assert test.p == pytest.approx(t_tail(t, 2), abs=1e-6)
    assert seeds_test(b, a).p == test.p


def test_the_test_over_different_seeds_is_welchs():
    a, b = {0: 70.0, 1: 72.0, 2: 71.5}, {3: 69.0, 4: 68.0}
    test = seeds_test(a, b)
    x, y = np.array(list(a.values())), np.array(list(b.values()))
    u, v = x.var(ddof=1) / 3, y.var(ddof=1) / 2
    freedom = (u + v) ** 2 / (u**2 / 2 + v**2 / 1)
    assert test.method.startswith("Welch")
    assert test.p == pytest.approx(t_tail((x.mean() - y.mean()) / math.sqrt(u + v), freedom), abs=1e-6)


def test_seeds_without_spread():
    assert seeds_test({0: 5.0, 1: 6.0}, {0: 5.0, 1: 6.0}).p == 1
    assert seeds_test({0: 5.1, 1: 6.1}, {0: 4.1, 1: 5.1}) is None, "an infinite statistic is no evidence"
    assert seeds_test({0: 5.0}, {0: 4.0}) is None


def test_the_interval_over_seeds():
    low, high = seeds_interval([70.0, 72.0, 71.5])
    reach = 4.302652729911275 * np.std([70.0, 72.0, 71.5], ddof=1) / math.sqrt(3)  # t of 2 degrees of freedom
    assert (low, high) == pytest.approx((71.1666667 - reach, 71.1666667 + reach))
    assert seeds_interval([70.0]) is None


@pytest.mark.parametrize("p", [[0.01, 0.04, 0.03], [0.5], [], [0.2, 0.2, 0.2], [0.001, 0.9, 0.02, 0.02, 1.0]])
def test_holm_follows_its_definition(p):
    """The corrected value is the largest of (m − rank + 1) p over all p-values that are not larger, at most 1."""
    ordered = sorted(p)
    expected = [max(min(1, (len(p) - k) * q) for k, q in enumerate(ordered) if q <= own) for own in p]
    assert holm(p) == pytest.approx(expected)


def test_ranks_over_streams():
    """Friedman's statistic by its formula, Nemenyi's distance by the quantile in Demšar's table (3 strategies: 2.343)."""
    values = {"a": [90, 80, 85, 70, 60, 75], "b": [80, 79, 86, 60, 50, 70], "c": [10, 20, 30, 40, 41, 42]}
    ranking = rank_strategies(values)
    assert ranking.names == ["a", "b", "c"]
    ranks = np.array([(1 * 5 + 2) / 6, (2 * 5 + 1) / 6, 3])
    assert ranking.ranks == pytest.approx(ranks)
    statistic = 12 * 6 / (3 * 4) * ((ranks**2).sum() - 3 * 4**2 / 4)
    assert ranking.p == pytest.approx(math.exp(-statistic / 2))  # chi-squared of 2 degrees of freedom
    assert ranking.critical_difference == pytest.approx(2.343 * math.sqrt(3 * 4 / 36), abs=1e-3)
    assert ranking.cliques() == [(0, 1), (1, 2)], "1 and 3 are further apart"
    assert rank_strategies(values, higher_is_better=False).names == ["c", "b", "a"]


@pytest.mark.parametrize(("strategies", "quantile"), [(4, 2.569), (5, 2.728), (10, 3.164)])
def test_the_critical_difference_is_demsars(strategies, quantile):
    values = np.random.default_rng(0).random((strategies, 8))
    ranking = rank_strategies({str(i): list(row) for i, row in enumerate(values)})
    assert ranking.critical_difference == pytest.approx(
        quantile * math.sqrt(strategies * (strategies + 1) / 48), abs=2e-3
    )


def test_equal_strategies_have_equal_ranks_and_p_1():
    ranking = rank_strategies({name: [50.0] * 5 for name in "abc"})
    assert (ranking.ranks, ranking.p, ranking.cliques()) == ([2, 2, 2], 1, [(0, 2)])


def test_few_streams_or_strategies_make_no_ranking():
    assert rank_strategies({name: [1.0, 2.0, 3.0, 4.0] for name in "abc"}) is None
    assert rank_strategies({name: [1.0] * 9 for name in "ab"}) is None
