"""What the page's template shows: plain values, in the order of the page."""

from __future__ import annotations

import datetime
import math
import shlex
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen
from markupsafe import Markup

from mulki_plugins.characters import printable
from mulki_plugins.recipe.settings import describe_settings
from mulki_plugins.report.beside import held_out_means, held_out_tasks
from mulki_plugins.report.compare import Group, differing_machines
from mulki_plugins.report.folder import settings_at
from mulki_plugins.report.page import charts
from mulki_plugins.report.page.answers import Interval, accuracy_interval, count_test_images
from mulki_plugins.report.page.experiment import Experiment
from mulki_plugins.report.page.losses import Losses, read_losses
from mulki_plugins.report.page.scales import change_step, level_step
from mulki_plugins.report.result import Result
from mulki_plugins.report.significance import ENOUGH_STRATEGIES, HIGHER_IS_BETTER, Ranking, rank_strategies
from mulki_plugins.report.tables import cell, labelled_rows

LONGEST_RECIPE = 100_000
"""Characters of a recipe on the page at most."""


@frozen
class Cell:
    """A cell of a heat map: accuracy in percent, its interval, its change against zero-shot, and its two colours."""

    accuracy: float
    interval: Interval | None
    change: float | None
    level: int
    shift: int | None
    place: str
    """`own` for the task just learned, `past` for one learned before, `future` for one not learned yet; else empty."""


@frozen
class Matrix:
    """A run's accuracies as a heat map."""

    title: str
    run: Result
    images: list[int | None]
    rows: list[tuple[str, list[Cell | None], float | None]]
    """The task learned before the row, its cells and their mean; None for what an extended run could not measure."""


def matrix_of(run: Result, title: str) -> Matrix:
    """The heat map of a run, as far as it got."""
    images = count_test_images(run)
    before: list[float | None] = [*run.zero_shot] or [None for _ in run.tasks]
    rows = []
    labelled = labelled_rows(run)
    staircase = len(labelled) - bool(run.zero_shot) == len(run.matrix) and run.base not in ("joint", "none")
    for i, (name, accuracies) in enumerate(labelled):
        learned = i - bool(run.zero_shot)
        cells = [
            None if math.isnan(a) else _cell(a, n, z, _place(learned, j) if staircase else "")
            for j, (a, n, z) in enumerate(zip(accuracies, images, before, strict=True))
        ]
        rows.append((name, cells, None if None in cells else statistics.fmean(accuracies)))
    return Matrix(title, run, images, rows)


def _cell(accuracy: float, images: int | None, zero_shot: float | None, place: str) -> Cell:
    change = None if zero_shot is None or math.isnan(zero_shot) else accuracy - zero_shot
    shift = None if change is None else change_step(change)
    return Cell(accuracy, accuracy_interval(accuracy, images), change, level_step(accuracy), shift, place)


def _place(learned: int, task: int) -> str:
    if learned < 0:
        return ""
    return "own" if learned == task else "past" if task < learned else "future"


def training_minutes(group: Group) -> float | None:
    """The mean time of the runs' training alone; None if it was not recorded."""
    recorded = [run.seconds.get("train") for run in group.runs]
    sums = [sum(seconds) for seconds in recorded if isinstance(seconds, list) and seconds and _are_numbers(seconds)]
    return statistics.fmean(sums) / 60 if sums else None


def _are_numbers(values: Sequence[Any]) -> bool:
    return all(isinstance(value, int | float) for value in values)


def devices_of(group: Group) -> str:
    """The devices that the runs used."""
    return ", ".join(dict.fromkeys(str(run.device.get("name") or "?") for run in group.runs))


@frozen
class Difference:
    """A setting in which the strategies of an experiment differ, with each strategy's value."""

    setting: str
    values: list[str]


def settings_that_differ(experiment: Experiment) -> list[Difference]:
    """The settings that are not the same for all strategies, from the recipes in their runs' folders."""
    recipes = [
        settings_at(Path(strategy.group.runs[0].folder)) if strategy.group.runs[0].folder else None
        for strategy in experiment.strategies
    ]
    readable = [recipe for recipe in recipes if recipe is not None]
    paths = dict.fromkeys(path for recipe in readable for path in recipe)
    differing = [p for p in paths if any(recipe.get(p) != readable[0].get(p) for recipe in readable)]
    return [
        Difference(
            path,
            ["?" if recipe is None else _value_of(path, recipe[path]) if path in recipe else "" for recipe in recipes],
        )
        for path in differing
    ]


def _value_of(path: str, value: Any) -> str:
    return describe_settings({path: value})[0].partition("=")[2]


@frozen
class LossChart:
    """A chart of losses with its values: the mean over the last tenth of the steps, for each line."""

    title: str
    svg: Markup
    ends: list[tuple[str, float]]


def loss_charts(experiment: Experiment) -> list[LossChart]:
    """The whole loss of all strategies, then the terms of each one's; of the first seed of each."""
    read: list[tuple[int, str, Losses]] = []
    for i, strategy in enumerate(experiment.strategies):
        first = min(strategy.group.runs, key=lambda run: run.seed)
        if first.folder and (losses := read_losses(Path(first.folder))).terms:
            read.append((i, f"{strategy.name}, seed {first.seed}", losses))
    made = []
    total = [
        (i, experiment.strategies[i].name, losses.terms["total"]) for i, _, losses in read if "total" in losses.terms
    ]
    if total:
        made.append(_loss_chart("All strategies: the whole loss", total, read[0][2].ends))
    for _, name, losses in read:
        terms = [(k, term, curve) for k, (term, curve) in enumerate(losses.terms.items()) if term != "total"]
        if len(terms) > 1:
            made.append(_loss_chart(f"{name}: the terms of the loss", terms, losses.ends))
    return made


def _loss_chart(title: str, curves: Sequence[tuple[int, str, Any]], ends: Sequence[int]) -> LossChart:
    values = []
    for _, name, curve in curves:
        tail = curve.points[-max(1, len(curve.points) // 10) :]
        values.append((name, statistics.fmean(value for _, value in tail)))
    return LossChart(title, charts.loss_chart(curves, ends, "loss"), values)


def rankings(compared: Sequence[Experiment]) -> dict[str, Ranking]:
    """For each metric the strategies ranked over the experiments; only those measured in every experiment.

    Experiments with fewer than ENOUGH_STRATEGIES are passed over.
    """
    ranked = {}
    for metric, better in HIGHER_IS_BETTER.items():
        tables = [
            {s.group.strategy: s.estimates[metric].mean for s in e.strategies if metric in s.estimates}
            for e in compared
            if len({s.group.strategy for s in e.strategies}) == len(e.strategies)  # else a name stands for two settings
        ]
        tables = [table for table in tables if len(table) >= ENOUGH_STRATEGIES]
        names = [name for name in (tables[0] if tables else {}) if all(name in table for table in tables)]
        if tables and (ranking := rank_strategies({name: [t[name] for t in tables] for name in names}, better)):
            ranked[metric] = ranking
    return ranked


def command_of(run: Result) -> str:
    """The command that repeats a run."""
    recipe = str(Path(run.folder) / "recipe.yaml") if run.folder else run.recipe
    return f"mulki run {shlex.quote(printable(recipe))} --seed {run.seed}"


def recipe_text(run: Result) -> str | None:
    """The resolved recipe in a run's folder; None if it cannot be read."""
    path = Path(run.folder) / "recipe.yaml"
    try:
        if not run.folder or not path.is_file():
            return None
        text = path.read_text("utf-8", "replace")[:LONGEST_RECIPE]
    except OSError:
        return None
    return "\n".join(map(printable, text.splitlines()))


def versions_of(results: Sequence[Result]) -> list[tuple[str, str]]:
    """Each library with the versions that the runs used."""
    names = dict.fromkeys(str(name) for run in results for name in run.versions)
    return [
        (name, ", ".join(sorted({str(run.versions[name]) for run in results if run.versions.get(name)})))
        for name in names
    ]


def count_strategies(compared: Sequence[Experiment]) -> str:
    """`5 strategies`."""
    count = len({strategy.name for experiment in compared for strategy in experiment.strategies})
    return f"{count} strateg{'y' if count == 1 else 'ies'}"


def warnings_of(results: Sequence[Result], compared: Sequence[Experiment]) -> Iterator[str]:
    """What makes the numbers of the page hard to compare."""
    counted = sum(len(strategy.group.runs) for experiment in compared for strategy in experiment.strategies)
    if repeated := sum(run.status == "complete" for run in results) - counted:
        yield f"{repeated} of these runs repeat a seed; only the latest run of each seed counts"
    yield from differing_machines(results)
    for reason in dict.fromkeys(reason for run in results for reason in run.incomparable):
        yield f"not comparable with published numbers: {reason}"


def held_out_rows(experiment: Experiment) -> list[tuple[str, str, list[str]]]:
    """For each held-out task and strategy, the accuracy at the end and before any training: `61.2 ± 0.4 (zero-shot 58.0)`."""
    groups = [strategy.group for strategy in experiment.strategies]
    rows = []
    for task in held_out_tasks(groups):
        cells = []
        for group in groups:
            means = held_out_means(group, task)
            cells.append("–" if means is None else f"{cell(*means[1])} (zero-shot {means[0][0]:.1f})")
        rows.append((task, printable(task), cells))
    return rows


def heading_of(experiment: Experiment) -> str:
    """The recipe of an experiment, and its number of tasks."""
    return f"{experiment.recipe}: {len(experiment.tasks)} task{'' if len(experiment.tasks) == 1 else 's'}"


def summary_of(results: Sequence[Result]) -> str:
    """`15 runs: 14 complete, 1 failed`."""
    counts = {
        status: sum(run.status == status for run in results) for status in ("complete", "running", "stopped", "failed")
    }
    parts = [f"{count} {status}" for status, count in counts.items() if count]
    return f"{len(results)} run{'' if len(results) == 1 else 's'}: {', '.join(parts)}"


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
