"""Runs grouped by experiment: mean and standard deviation over seeds for each recipe, strategy and setting."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from attrs import evolve, field, frozen

from mulki_plugins.characters import printable
from mulki_plugins.recipe.settings import describe_settings
from mulki_plugins.report.folder import settings_at
from mulki_plugins.report.result import Result, as_plain_data

SHOWN = 4
"""Settings shown in a group's name."""


@frozen(kw_only=True)
class Group:
    """The complete runs of one experiment: same recipe, strategy, tasks, protocol and settings, a run for each seed."""

    recipe: str
    strategy: str
    seeds: list[int]
    metrics: dict[str, tuple[float, float | None]]
    """Mean, and standard deviation over seeds (n − 1) if there are at least two."""
    tasks: list[str]
    protocol: dict[str, Any]
    runs: list[Result]
    settings: dict[str, Any] = field(factory=dict)
    """The settings in which it differs from other groups of its recipe and strategy, as far as their recipes are readable."""

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
    return Group(
        recipe=first.recipe, strategy=first.strategy, seeds=sorted(run.seed for run in runs), metrics=metrics,
        tasks=first.tasks, protocol=first.protocol, runs=runs,
    )  # fmt: skip


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
        for i, recipe in zip(indices, recipes, strict=True):
            if recipe is not None:
                compared[i] = evolve(compared[i], settings={path: recipe.get(path) for path in differing})
    return compared


def comparison_data(results: Sequence[Result]) -> dict[str, Any]:
    """The whole runs, their summary and notes, ready for JSON."""
    summary = [
        {
            "recipe": group.recipe, "strategy": group.strategy, "settings": group.settings, "seeds": group.seeds,
            "tasks": group.tasks,
            "metrics": {name: {"mean": mean, "std": std} for name, (mean, std) in group.metrics.items()},
        }
        for group in groups(results)
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
