"""Runs grouped by experiment: mean and standard deviation over seeds for each recipe, strategy and setting."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from attrs import evolve, field, frozen

from mulki_plugins.characters import printable
from mulki_plugins.errors import MulkiError, did_you_mean
from mulki_plugins.recipe.settings import describe_settings
from mulki_plugins.report.folder import settings_at
from mulki_plugins.report.result import Result, as_plain_data

SHOWN = 4
"""Settings shown in a group's name."""

TASKS = "stream.tasks"
"""The setting in which runs of different tasks differ; named by the tasks, whatever it says about each."""
ORDER = "stream.order"
"""The setting for which the summary has a column of its own."""

COSTS = {"time": "seconds", "memory": "peak MiB", "trained": "trained weights", "flops": "training FLOPs"}
"""What a run costs, and the unit of each number."""
_LESS_IS_BETTER = ("forgetting", "name", *COSTS)

MeanAndDeviation = tuple[float, float | None]
"""Over seeds (n − 1); the deviation is None for a single seed."""


@frozen(kw_only=True)
class Group:
    """The complete runs of one experiment: same recipe, strategy, tasks, protocol and settings, a run for each seed."""

    recipe: str
    strategy: str
    seeds: list[int]
    metrics: dict[str, MeanAndDeviation]
    just_learned: MeanAndDeviation
    """The accuracy on each task after its own training: the mean of the matrix's diagonal."""
    costs: dict[str, MeanAndDeviation]
    """By COSTS; runs of earlier versions recorded fewer."""
    tasks: list[str]
    protocol: dict[str, Any]
    runs: list[Result]
    settings: dict[str, Any] = field(factory=dict)
    """The settings in which it differs from other groups of its recipe and strategy, as far as their recipes are readable."""
    order: str = ""
    """The stream's `order`, if it has one."""

    def by_task(self, metric: str) -> dict[str, MeanAndDeviation]:
        """`transfer`, `average`, `last` or `just_learned` for each task; empty if joint training has no such number."""
        if self._lacks(metric):
            return {}
        values = [_by_task(metric, run.matrix) for run in self.runs]
        tasks = self.tasks[1:] if metric == "transfer" else self.tasks
        return {t: mean_and_deviation(column) for t, column in zip(tasks, zip(*values, strict=True), strict=True)}

    def mean_of(self, metric: str) -> MeanAndDeviation | None:
        """The same, averaged over tasks."""
        if self._lacks(metric):
            return None
        return mean_and_deviation([statistics.fmean(_by_task(metric, run.matrix)) for run in self.runs])

    def _lacks(self, metric: str) -> bool:
        if metric == "transfer" and any(math.isnan(value) for run in self.runs for row in run.matrix for value in row):
            return True  # an extended run whose earlier weights were not kept
        return (len(self.tasks) == 1 and metric == "transfer") or (
            self.runs[0].base == "joint" and metric not in ("last", "just_learned")
        )

    @property
    def name(self) -> str:
        """The strategy and the settings that distinguish the group."""
        words = describe_settings(self.settings)
        more = f" and {len(words) - SHOWN} more" if len(words) > SHOWN else ""
        return printable(" ".join([self.strategy, *words[:SHOWN]]) + more)


def groups(results: Sequence[Result]) -> list[Group]:
    """Complete runs by recipe, strategy, tasks, protocol and settings."""
    gathered: dict[tuple[str, ...], list[Result]] = {}
    for result in results:
        if result.status == "complete":
            protocol = str(sorted(result.protocol.items()))
            key = (result.recipe, result.strategy, str(result.tasks), protocol, result.settings)
            gathered.setdefault(key, []).append(result)
    return _distinguish([_group(_latest_of_each_seed(runs)) for runs in gathered.values()])


def sorted_groups(compared: Sequence[Group], by: str | None) -> list[Group]:
    """The groups with the best first: by a metric, `just-learned`, `name` or one of COSTS; None: as they are.

    Groups without that number come last. MulkiError for an unknown name.
    """
    if by is None:
        return list(compared)
    known = {*(name for group in compared for name in group.metrics), "just-learned", "name", *COSTS}
    if by not in known:
        raise MulkiError(f"--sort {by}: no such column", did_you_mean(by, known))

    def key(group: Group) -> tuple[bool, Any]:
        if by == "name":
            return False, (group.recipe, group.name)
        value = group.just_learned if by == "just-learned" else group.metrics.get(by) or group.costs.get(by)
        return value is None, value and (value[0] if by in _LESS_IS_BETTER else -value[0])

    return sorted(compared, key=key)


def _latest_of_each_seed(runs: list[Result]) -> list[Result]:
    """A run repeated with the same seed is not a second sample."""
    return list({run.seed: run for run in sorted(runs, key=lambda run: run.started)}.values())


def _group(runs: list[Result]) -> Group:
    metrics = {}
    for name in dict.fromkeys(name for run in runs for name in run.metrics):
        values = [value for run in runs if (value := run.metrics.get(name)) is not None]
        if values:  # else the metric failed in every run
            metrics[name] = mean_and_deviation(values)
    first = runs[0]
    costs: dict[str, list[float]] = {}
    for run in runs:
        for name, value in _costs(run).items():
            costs.setdefault(name, []).append(value)
    return Group(
        recipe=first.recipe, strategy=first.strategy, seeds=sorted(run.seed for run in runs), metrics=metrics,
        tasks=first.tasks, protocol=first.protocol, runs=runs,
        just_learned=mean_and_deviation([statistics.fmean(_by_task("just_learned", run.matrix)) for run in runs]),
        costs={name: mean_and_deviation(values) for name, values in costs.items()},
    )  # fmt: skip


def _costs(run: Result) -> dict[str, float]:
    """What the run recorded of its cost."""
    recorded: dict[str, Any] = {
        "time": run.seconds.get("total"), "memory": run.device.get("peak_memory_mib"), "trained": run.parameters.get("trained"),
        "flops": run.flops.get("total"),
    }  # fmt: skip
    return {
        name: float(value)
        for name, value in recorded.items()
        if type(value) in (int, float) and math.isfinite(value) and value >= 0
    }


def _by_task(metric: str, matrix: Sequence[Sequence[float]]) -> list[float]:
    from mulki_plugins import metrics  # numpy, which other commands do without

    if metric == "just_learned":
        return [row[i] for i, row in enumerate(matrix)]
    if len(matrix) == 1 or metric == "last":  # the metrics need two tasks
        return list(matrix[-1])
    values: list[float] = getattr(metrics, f"{metric}_by_task")(matrix).tolist()
    return values


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and the standard deviation (n − 1) of two or more values."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def _distinguish(compared: list[Group]) -> list[Group]:
    """Add to groups of the same recipe and strategy the settings in which they differ, read from their runs' recipes."""
    by_name: dict[tuple[str, str], list[int]] = {}
    for i, group in enumerate(compared):
        by_name.setdefault((group.recipe, group.strategy), []).append(i)
    for indices in by_name.values():
        if len(indices) == 1:
            continue
        folders = [compared[i].runs[0].folder for i in indices]
        recipes = [settings_at(Path(folder)) if folder else None for folder in folders]
        readable = [recipe for recipe in recipes if recipe is not None]
        paths = dict.fromkeys(path for recipe in readable for path in recipe)
        differing = [p for p in paths if any(recipe.get(p) != readable[0].get(p) for recipe in readable)]
        others = len({tuple(compared[i].tasks) for i in indices}) > 1
        inside = [path for path in differing if others and re.match(rf"{re.escape(TASKS)}(\[|$)", path)]
        for i, recipe in zip(indices, recipes, strict=True):
            if recipe is not None:
                settings = {path: recipe.get(path) for path in differing if path not in inside}
                tasks = {TASKS: _in_short(compared[i].tasks)} if inside else {}
                compared[i] = evolve(compared[i], settings=tasks | settings)
    if len({tuple(group.tasks) for group in compared}) > 1:
        return [evolve(group, order=_order_of(group.runs[0])) for group in compared]
    return compared


def _in_short(tasks: Sequence[str]) -> str:
    return ",".join(tasks if len(tasks) <= SHOWN else [tasks[0], "...", tasks[-1]])


def _order_of(run: Result) -> str:
    settings = settings_at(Path(run.folder)) if run.folder else None
    return printable(str((settings or {}).get(ORDER, "")))


def _named(value: MeanAndDeviation) -> dict[str, float | None]:
    mean, deviation = value
    return {"mean": None if math.isnan(mean) else mean, "std": deviation}


def comparison_data(results: Sequence[Result], sort: str | None = None) -> dict[str, Any]:
    """The whole runs, their summary and notes, ready for JSON. sort: see `sorted_groups`."""
    summary = [
        {
            "recipe": group.recipe, "strategy": group.strategy, "settings": group.settings, "seeds": group.seeds,
            "tasks": group.tasks,
            "metrics": {name: _named(value) for name, value in group.metrics.items()},
            "order": group.order or None,
            "just_learned": _named(group.just_learned),
            "costs": {name: _named(value) for name, value in group.costs.items()},
            "by_task": {
                metric: {task: _named(value) for task, value in group.by_task(metric).items()}
                for metric in ("transfer", "just_learned", "last")
            },
        }
        for group in sorted_groups(groups(results), sort)
    ]  # fmt: skip
    return {
        "runs": [as_plain_data(result) for result in results],
        "summary": summary,
        "notes": list(differing_machines(results)),
    }


def differing_machines(results: Sequence[Result]) -> Iterator[str]:
    """A note if complete runs used different libraries, threads or machines."""
    machines = [{**run.versions, **_machine(run.device)} for run in results if run.status == "complete"]
    differing = []
    for name in dict.fromkeys(name for machine in machines for name in machine):
        values = sorted({str(machine[name]) for machine in machines if machine.get(name) not in (None, "")})
        if len(values) > 1:
            differing.append(f"{name} ({', '.join(values)})")
    if differing:
        yield printable(f"these runs differ in {', '.join(differing)}: equal seeds need not give equal digits")


def _machine(device: dict[str, Any]) -> dict[str, Any]:
    """The facts about a device that can change digits: threads matter on a CPU only."""
    if device.get("type") == "cpu":
        return {"device": "cpu", "platform": device.get("platform"), "threads": device.get("threads")}
    return {"device": device.get("name"), "platform": device.get("platform")}
