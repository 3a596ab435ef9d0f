"""The strategies of one experiment compared: estimates of their metrics, and the tests between them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

import numpy as np
from attrs import evolve, field, frozen

from mulki_plugins.characters import printable
from mulki_plugins.report.compare import Group, groups
from mulki_plugins.report.page.answers import Answers, Interval, read_answers
from mulki_plugins.report.result import Result
from mulki_plugins.report.significance import (
    HIGHER_IS_BETTER,
    Floats,
    Test,
    bootstrap_test,
    holm,
    interval,
    resample_mean,
    resample_metrics,
    seeds_interval,
    seeds_test,
)

LEVEL = 0.05
"""A difference counts as significant below this corrected p-value."""


@frozen
class Estimate:
    """A metric of a strategy: mean and standard deviation over seeds, a confidence interval and how it was computed."""

    mean: float
    deviation: float | None
    interval: Interval | None
    method: str


@frozen
class Compared:
    """A test between two strategies, given by their indices, and its p-value corrected for all pairs of the metric."""

    first: int
    second: int
    test: Test
    corrected: float

    @property
    def significant(self) -> bool:
        return self.corrected < LEVEL

    def of(self, strategy: int) -> Compared:
        """The same with this strategy first."""
        if strategy == self.first:
            return self
        return evolve(self, first=self.second, second=self.first, test=self.test.reversed())


@frozen(eq=False)
class Strategy:
    """The runs of one strategy in an experiment, one for each seed."""

    name: str
    group: Group
    estimates: dict[str, Estimate]

    def cell(self, row: int, task: int) -> list[float]:
        """The accuracies of all seeds on a task; row 0 is the zero-shot row."""
        rows = [run.zero_shot if row == 0 else run.matrix[row - 1] for run in self.group.runs]
        return [accuracies[task] for accuracies in rows if accuracies and not math.isnan(accuracies[task])]


@frozen(eq=False)
class Experiment:
    """Strategies that learned the same tasks in the same order, by one recipe and one protocol."""

    recipe: str
    protocol: dict[str, object]
    tasks: list[str]
    strategies: list[Strategy]
    tests: dict[str, list[Compared]] = field(factory=dict)
    """By metric; only the pairs that could be tested."""
    notes: list[str] = field(factory=list)

    @property
    def metrics(self) -> list[str]:
        return list(dict.fromkeys(name for strategy in self.strategies for name in strategy.estimates))

    def compared(self, metric: str, first: int, second: int) -> Compared | None:
        """The test of two strategies, in this direction; None if there is none."""
        for pair in self.tests.get(metric, []):
            if {pair.first, pair.second} == {first, second}:
                return pair.of(first)
        return None

    def best(self, metric: str) -> list[int]:
        """The best strategy and all that the tests cannot tell from it; empty if it was not tested against every other one."""
        means = {i: s.estimates[metric].mean for i, s in enumerate(self.strategies) if metric in s.estimates}
        if metric not in HIGHER_IS_BETTER or len(means) < 2:
            return []
        top = (max if HIGHER_IS_BETTER[metric] else min)(means, key=means.__getitem__)
        tests = {i: self.compared(metric, top, i) for i in means if i != top}
        worse = {i for i, test in tests.items() if test is not None and test.significant}
        return [] if None in tests.values() else [i for i in means if i not in worse]


def experiments(results: Sequence[Result], resamples: int) -> list[Experiment]:
    """Complete runs by recipe, tasks and protocol, each with its estimates and tests."""
    gathered: dict[tuple[str, ...], list[Group]] = {}
    for group in groups(results):
        key = (group.recipe, "\0".join(group.tasks), str(sorted(group.protocol.items())))
        gathered.setdefault(key, []).append(group)
    return [_compare(members, resamples) for members in gathered.values()]


def _compare(members: Sequence[Group], resamples: int) -> Experiment:
    names = _names(members)
    answers, notes = _answers(members, names)
    resampled = _resample(members, answers, resamples)
    strategies = [
        Strategy(name, group, _estimates(group, drawn))
        for name, group, drawn in zip(names, members, resampled, strict=True)
    ]
    first = members[0]
    known = dict.fromkeys(name for group in members for name in group.metrics if name in HIGHER_IS_BETTER)
    tests = {name: _test_pairs(members, resampled, name) for name in known}
    notes += _notes(members, tests)
    return Experiment(
        first.recipe, first.protocol, first.tasks, strategies, {n: t for n, t in tests.items() if t}, notes
    )


def _names(members: Sequence[Group]) -> list[str]:
    """The groups' names, with a number where two are equal."""
    names = [group.name for group in members]
    return [f"{name} ({names[:i].count(name) + 1})" if names.count(name) > 1 else name for i, name in enumerate(names)]


def _answers(members: Sequence[Group], names: Sequence[str]) -> tuple[list[list[Answers] | None], list[str]]:
    """For each group the answers of all its runs, or None if one of them cannot be used; and why not."""
    found: list[list[Answers] | None] = []
    notes = []
    reference: Answers | None = None
    for name, group in zip(names, members, strict=True):
        answers: list[Answers] = []
        for run in group.runs:
            read, reason = read_answers(run) if len(group.tasks) > 1 else (None, "")
            if read is not None and reference is not None and not reference.comparable_with(read):
                read, reason = None, "it was tested on other images than the runs before"
            if read is None:
                if reason:
                    notes.append(printable(f"{name}, seed {run.seed}: {reason}: no statistics over images"))
                break
            reference = reference or read
            answers.append(read)
        found.append(answers if len(answers) == len(group.runs) else None)
    return found, notes


def _resample(
    members: Sequence[Group], answers: Sequence[list[Answers] | None], resamples: int
) -> list[dict[str, Floats]]:
    """For each group its metrics with images and seeds drawn anew; empty without answers."""
    usable = [each for each in answers if each is not None]
    values = resample_metrics([run.rights for each in usable for run in each], resamples) if usable else {}
    resampled: list[dict[str, Floats]] = []
    first = 0
    for group, each in zip(members, answers, strict=True):
        if each is None:
            resampled.append({})
            continue
        seeds = [run.seed for run in group.runs]
        places = first + np.argsort(seeds)  # so that equal seeds are drawn together, whatever their order
        first += len(each)
        resampled.append({n: resample_mean(v[places], sorted(seeds)) for n, v in values.items() if n in group.metrics})
    return resampled


def _estimates(group: Group, resampled: Mapping[str, Floats]) -> dict[str, Estimate]:
    estimates = {}
    for name, (mean, deviation) in group.metrics.items():
        values = list(by_seed(group, name).values())
        if name in resampled:
            bounds: Interval | None = interval(resampled[name])
            method = "images and seeds" if len(group.runs) > 1 else "images"
        else:
            bounds = seeds_interval(values)
            method = "seeds" if bounds else ""
        if bounds and name in HIGHER_IS_BETTER:  # percentages, whatever a normal or widened spread reaches
            bounds = max(0.0, bounds[0]), min(100.0, bounds[1])
        estimates[name] = Estimate(mean, deviation, bounds, method)
    return estimates


def by_seed(group: Group, metric: str) -> dict[int, float]:
    """A metric's value for each seed that has one."""
    return {run.seed: value for run in group.runs if (value := run.metrics.get(metric)) is not None}


def _test_pairs(members: Sequence[Group], resampled: Sequence[Mapping[str, Floats]], metric: str) -> list[Compared]:
    tested: list[tuple[int, int, Test]] = []
    for i, j in combinations(range(len(members)), 2):
        if metric not in members[i].metrics or metric not in members[j].metrics:
            continue
        if metric in resampled[i] and metric in resampled[j]:
            difference = members[i].metrics[metric][0] - members[j].metrics[metric][0]
            tested.append((i, j, bootstrap_test(difference, resampled[i][metric] - resampled[j][metric])))
        elif (test := seeds_test(by_seed(members[i], metric), by_seed(members[j], metric))) is not None:
            tested.append((i, j, test))
    corrected = holm([test.p for *_, test in tested])
    return [Compared(i, j, test, p) for (i, j, test), p in zip(tested, corrected, strict=True)]


def _notes(members: Sequence[Group], tests: Mapping[str, list[Compared]]) -> Iterator[str]:
    if len(members[0].tasks) == 1:
        yield "A single task has no matrix to compute metrics from: nothing is compared."
        return
    if len(members) > 1 and not any(tests.values()):
        yield "Nothing is tested: a test needs kept predictions, or at least two seeds of each strategy."
    if any(len(group.seeds) == 1 for group in members):
        yield "Strategies with one seed: their intervals and tests say nothing about other seeds."
    budgets = {str(sorted(run.budget.items())) for group in members for run in group.runs if run.base != "none"}
    if len(budgets) > 1:
        yield "These strategies were trained with different budgets."


def mean_row(strategy: Strategy, row: int) -> list[float]:
    """The mean over all tasks for each seed; row 0 is the zero-shot row."""
    rows = [run.zero_shot if row == 0 else run.matrix[row - 1] for run in strategy.group.runs]
    return [statistics.fmean(accuracies) for accuracies in rows if accuracies and not any(map(math.isnan, accuracies))]
