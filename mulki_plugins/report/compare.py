"""Several runs beside each other: mean and standard deviation over seeds, one line for each recipe and strategy."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from attrs import asdict, evolve, field, frozen

from mulki_plugins.characters import printable
from mulki_plugins.recipe.settings import describe_settings
from mulki_plugins.report.folder import settings_at
from mulki_plugins.report.result import Result
from mulki_plugins.report.table import heading, matrix_table

SHOWN = 4
"""So many settings of a line are shown."""


@frozen(kw_only=True)
class Group:
    """The complete runs of one recipe and strategy that were measured alike."""

    recipe: str
    strategy: str
    seeds: list[int]
    metrics: dict[str, tuple[float, float | None]]
    """Mean, and standard deviation over seeds (n − 1) where there are at least two."""
    tasks: list[str]
    protocol: dict[str, Any]
    runs: list[Result]
    """One for each seed."""
    settings: dict[str, Any] = field(factory=dict)
    """What sets it apart from the other groups of its recipe and strategy, where their recipes say so."""

    @property
    def name(self) -> str:
        """The strategy, with the settings that set the runs apart."""
        said = describe_settings(self.settings)
        more = f" and {len(said) - SHOWN} more" if len(said) > SHOWN else ""
        return printable(" ".join([self.strategy, *said[:SHOWN]]) + more)


def groups(results: Sequence[Result]) -> list[Group]:
    """Complete runs by recipe, strategy, tasks, protocol and settings."""
    gathered: dict[tuple[str, ...], list[Result]] = {}
    for result in results:
        if result.status == "complete":
            protocol = str(sorted(result.protocol.items()))
            key = (result.recipe, result.strategy, str(result.tasks), protocol, result.settings)
            gathered.setdefault(key, []).append(result)
    return _told_apart([_group(_once(runs)) for runs in gathered.values()])


def _told_apart(found: list[Group]) -> list[Group]:
    """Groups of one recipe and strategy with the settings in which they differ, from the recipes in their folders."""
    alike: dict[tuple[str, str], list[int]] = {}
    for i, group in enumerate(found):
        alike.setdefault((group.recipe, group.strategy), []).append(i)
    for places in alike.values():
        if len(places) == 1:
            continue
        folders = [found[i].runs[0].folder for i in places]
        recipes = [settings_at(Path(folder)) if folder else None for folder in folders]
        known = [recipe for recipe in recipes if recipe is not None]
        paths = dict.fromkeys(path for recipe in known for path in recipe)
        differing = [p for p in paths if any(recipe.get(p) != known[0].get(p) for recipe in known)]
        for i, recipe in zip(places, recipes, strict=True):
            if recipe is not None:
                found[i] = evolve(found[i], settings={path: recipe.get(path) for path in differing})
    return found


def _once(runs: list[Result]) -> list[Result]:
    """Of several runs with the same seed the one that began last: a repetition is no second sample."""
    return list({run.seed: run for run in sorted(runs, key=lambda run: run.started)}.values())


def _group(runs: list[Result]) -> Group:
    metrics = {}
    for name in dict.fromkeys(name for run in runs for name in run.metrics):
        values = [value for run in runs if (value := run.metrics.get(name)) is not None]
        if not values:  # the metric failed in all of them
            continue
        metrics[name] = (statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)
    first = runs[0]
    return Group(
        recipe=first.recipe, strategy=first.strategy, seeds=sorted(run.seed for run in runs), metrics=metrics,
        tasks=first.tasks, protocol=first.protocol, runs=runs,
    )  # fmt: skip


def comparison_data(results: Sequence[Result]) -> dict[str, Any]:
    """The runs whole, and their summary, as printable data."""
    summary = [
        {
            "recipe": group.recipe, "strategy": group.strategy, "settings": group.settings, "seeds": group.seeds,
            "tasks": group.tasks,
            "metrics": {name: {"mean": mean, "std": std} for name, (mean, std) in group.metrics.items()},
        }
        for group in groups(results)
    ]  # fmt: skip
    notes = list(_machines(results))
    return {"runs": [asdict(result) for result in results], "summary": summary, "notes": notes}


def _machines(results: Sequence[Result]) -> Iterator[str]:
    """Where complete runs differ in the libraries, threads or machine that computed them."""
    complete = [result for result in results if result.status == "complete"]
    places = [{**result.versions, **_place(result.device)} for result in complete]
    found = []
    for name in dict.fromkeys(name for place in places for name in place):
        values = sorted({str(place[name]) for place in places if place.get(name) not in (None, "")})
        if len(values) > 1:
            found.append(f"{name} ({', '.join(values)})")
    if found:
        yield printable(f"these runs differ in {', '.join(found)}: equal seeds need not give equal digits")


def _place(device: dict[str, Any]) -> dict[str, Any]:
    said = {"device": device.get("type"), "platform": device.get("platform"), "threads": device.get("threads")}
    return said if said["device"] == "cpu" else {**said, "threads": None, "device": device.get("name")}


def comparison_text(results: Sequence[Result]) -> str:
    """One run: its table. Several: a line for each strategy, and what keeps lines from being compared."""
    if len(results) == 1:
        return f"{heading(results[0])}\n{matrix_table(results[0])}"
    found = groups(results)
    lines = _summary(found) if found else []
    for result in results:
        if result.status != "complete":
            lines.append(
                f"left out: {heading(result)}: {printable(result.status)}, {len(result.matrix)} of {len(result.tasks)} tasks"
            )
    if len({str(sorted(group.protocol.items())) for group in found}) > 1:
        lines.append("note: these runs were evaluated by different protocols; their numbers are not comparable")
    elif len({str(group.tasks) for group in found}) > 1:
        lines.append("note: these runs learned different tasks, or in different orders")
    again = sum(result.status == "complete" for result in results) - sum(len(group.seeds) for group in found)
    if again:
        lines.append(f"note: {again} of these runs repeated a seed; of each seed only the run that began last counts")
    lines += [f"note: {note}" for note in _machines(results)]
    named = [(group.recipe, group.name) for group in found]
    if len(set(named)) < len(named):
        lines.append("note: lines of the same name differ in their settings; compare the `recipe.yaml` of their runs")
    return "\n".join(lines)


def _summary(found: list[Group]) -> list[str]:
    metrics = list(dict.fromkeys(name for group in found for name in group.metrics))
    label = max(len("strategy"), *(len(group.name) for group in found)) + 2
    recipe = max(len("recipe"), *(len(printable(group.recipe)) for group in found)) + 2
    lines = [
        f"{'recipe':<{recipe}}{'strategy':<{label}}{'seeds':>5}" + "".join(f"{printable(name):>16}" for name in metrics)
    ]
    lines.append("-" * len(lines[0]))
    for group in found:
        cells = [cell(*group.metrics[name]) if name in group.metrics else "-" for name in metrics]
        head = f"{printable(group.recipe):<{recipe}}{group.name:<{label}}{len(group.seeds):>5}"
        lines.append(head + "".join(f"{cell:>16}" for cell in cells))
    return lines


def cell(mean: float, std: float | None) -> str:
    """A mean over seeds, with its standard deviation where there is one."""
    return f"{mean:.2f}" if std is None else f"{mean:.2f} ± {std:.2f}"
