"""Results as text tables: one run's accuracy matrix, several runs compared, runs beside published numbers."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from attrs import evolve

from mulki_plugins.characters import printable, width
from mulki_plugins.report.beside import HELD_OUT_NOTE, columns_beside, held_out_table
from mulki_plugins.report.compare import COSTS, ORDER, Group, differing_machines, groups, sorted_groups
from mulki_plugins.report.formats import Cell, Table, lines_of, terminal_width
from mulki_plugins.report.formats import columns as columns  # the commands import it from here
from mulki_plugins.report.published import Comparison, compare_with_published
from mulki_plugins.report.published_rows import METRICS, NOT_STATED, ORDERS, explanations, words_for_shots
from mulki_plugins.report.result import Result


def matrix_table(result: Result) -> str:
    """A run's accuracies in percent: a row for each trained task, a column for each test set, the metrics below."""
    names = [printable(name) for name in result.tasks]
    widest = max(6, *map(width, names))
    beside = columns_beside(result)
    rows = [["after  ", *names, "mean", *map(printable, beside)]]
    for i, (name, values) in enumerate(labelled_rows(result)):
        more = [_percent_or_blank(column, i) for column in beside.values()]
        rows.append([f"{name}  ", *map(_percent, values), _percent(sum(values) / len(values)), *more])
    least = [max(map(width, ("zero-shot", *names))) + 2, *[widest] * len(names), 7]
    head, *body = columns(rows, "<>", least, gap=" ")
    rule = "-" * width(head)
    lines = [head, rule, *body, rule]
    if result.metrics:
        lines.append("   ".join(f"{printable(n).capitalize()} {_number(value)}" for n, value in result.metrics.items()))
    if result.held_out:
        lines.append(HELD_OUT_NOTE)
    if result.parent:
        lines.append(f"extends {printable(str(result.parent.get('folder')))}, which learned {_tasks(result.parent)}")
    if result.status != "complete":
        error = f"; {printable(result.error)}" if result.error else ""
        lines.append(f"{printable(result.status)}: {len(result.matrix)} of {len(names)} tasks finished{error}")
    return "\n".join(lines)


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1f}"


def _percent_or_blank(column: Sequence[float | None], row: int) -> str:
    value = column[row] if row < len(column) else None
    return "" if value is None else _percent(value)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def labelled_rows(result: Result) -> list[tuple[str, list[float]]]:
    """The zero-shot row and the rows of the matrix, each with the task learned last; joint training has a single row."""
    rows = [("zero-shot", result.zero_shot)] if result.zero_shot else []
    if result.base == "joint" and result.matrix:
        return [*rows, ("all tasks", result.matrix[-1])]
    return [*rows, *zip(result.tasks, result.matrix, strict=False)]


def matrix_csv(result: Result) -> str:
    """The zero-shot row and the matrix as CSV, with headings; then a column for each held-out task."""
    held_out = [[f"{name} (held out)", *map(_exactly, column)] for name, column in result.held_out.items()]
    rows = [["after", *result.tasks], ["zero-shot", *map(_exactly, result.zero_shot)]]
    rows += [[task, *map(_exactly, row)] for task, row in zip(result.tasks, result.matrix, strict=False)]
    rows = [[*row, *(column[i] for column in held_out if i < len(column))] for i, row in enumerate(rows)]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)  # the name of a task may contain a comma
    return text.getvalue()


def _exactly(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4f}"


def heading(result: Result) -> str:
    """One line that identifies the run."""
    where = f"  ({printable(result.folder)})" if result.folder else ""
    return f"{printable(result.recipe)} / {printable(result.strategy)} / seed {result.seed}{where}"


def cell(mean: float, std: float | None) -> str:
    """A mean over seeds, with the standard deviation of several seeds."""
    return f"{mean:.2f}" if std is None else f"{mean:.2f} ± {std:.2f}"


def comparison_text(results: Sequence[Result], sort: str | None = None, most: int | None = None) -> str:
    """The table of a single run, or a line for each strategy with notes on what makes lines incomparable.

    sort: see `sorted_groups`. most: the width of the lines, if the names leave room for it; None for the terminal's.
    """
    most = most or terminal_width()
    if len(results) == 1:
        return "\n".join([heading(results[0]), *_matrix_lines(results[0], most)])
    compared = sorted_groups(groups(results), sort)
    lines = lines_of(summary_table(compared), most) if compared else []
    for result in results:
        if result.status != "complete":
            progress = f"{printable(result.status)}, {len(result.matrix)} of {len(result.tasks)} tasks"
            lines.append(f"left out: {heading(result)}: {progress}")
    return "\n".join([*lines, *(f"note: {note}" for note in notes_on(results, compared))])


def _matrix_lines(result: Result, most: int) -> list[str]:
    """The matrix with the names of the tasks as headings, or with their numbers where that is too wide."""
    lines = matrix_table(result).split("\n")
    if width(lines[0]) <= most:
        return lines
    narrow, rule = lines_of(numbered_matrix(result), most), lines[1]
    foot = lines[lines.index(rule, 2) + 1 :]  # the metrics and the status, below the second rule
    return [*narrow, narrow[1], *foot]


def numbered_matrix(result: Result) -> Table:
    """The matrix with a number for each task, which its row explains."""
    rows: list[list[Cell]] = []
    labels, beside = labelled_rows(result), columns_beside(result)
    for row, (name, values) in enumerate(labels):
        i = row + (0 if result.zero_shot else 1)
        is_task = len(labels) - bool(result.zero_shot) == len(result.matrix) and i > 0
        more = [column[row] if row < len(column) else None for column in beside.values()]
        rows.append([f"{i} {name}" if is_task else name, *values, sum(values) / len(values), *more])
    for i in range(len(result.matrix) + 1, len(result.tasks) + 1):
        rows.append([f"{i} {result.tasks[i - 1]}", *[None] * len(result.tasks), None])
    numbers = [str(i) for i in range(1, len(result.tasks) + 1)]
    return Table(title="", head=["after", *numbers, "mean", *beside], rows=rows, gap=" ", digits=1)


def matrix_data(result: Result) -> Table:
    """The matrix under the names of the tasks, for other formats."""
    beside = columns_beside(result)
    rows: list[list[Cell]] = [
        [name, *values, sum(values) / len(values), *(c[i] if i < len(c) else None for c in beside.values())]
        for i, (name, values) in enumerate(labelled_rows(result))
    ]
    foot = ["   ".join(f"{name.capitalize()} {_number(value)}" for name, value in result.metrics.items())]
    return Table(
        title=heading(result),
        head=["after", *result.tasks, "mean", *beside],
        rows=rows,
        digits=1,
        foot=list(filter(None, foot)),
    )


def summary_table(compared: Sequence[Group], *, units: bool = True) -> Table:
    """A line for each group: its metrics, the accuracy on tasks just learned, and its cost.

    units: give each cost the unit that suits it, for a reader; otherwise all are numbers, their units in the heading.
    """
    names = list(dict.fromkeys(name for group in compared for name in group.metrics))
    costs = [name for name in COSTS if any(name in group.costs for group in compared)]
    ordered = len({group.order for group in compared}) > 1
    rows: list[list[Cell]] = []
    for group in compared:
        name = (
            evolve(group, settings={k: v for k, v in group.settings.items() if k != ORDER}).name
            if ordered
            else group.name
        )
        labels: list[Cell] = [group.recipe, name, *([group.order or "-"] if ordered else []), str(len(group.seeds))]
        costly: list[Cell] = [
            format_cost(name, group.costs.get(name)) if units else group.costs.get(name) for name in costs
        ]
        rows.append([*labels, *(group.metrics.get(name) for name in names), group.just_learned, *costly])
    head = ["recipe", "strategy", *(["order"] if ordered else []), "seeds", *names, "just learned"]
    head += costs if units else [COSTS[name] for name in costs]
    return Table(title="", head=head, rows=rows, labels=4 if ordered else 3)


_LARGE = {"E": 1e18, "P": 1e15, "T": 1e12, "G": 1e9, "M": 1e6}


def format_cost(name: str, value: tuple[float, float | None] | None) -> str:
    """A cost with its unit: `4.1 min`, `812 MiB`, `2.8 M`, `3.2 PFLOP`."""
    if value is None:
        return "-"
    if name == "time":
        seconds = value[0]
        return (
            f"{seconds:.0f} s"
            if seconds < 100
            else f"{seconds / 60:.1f} min"
            if seconds < 6000
            else f"{seconds / 3600:.1f} h"
        )
    if name == "memory":
        return f"{value[0]:.0f} MiB"
    if name == "flops":
        unit, size = next(((unit, size) for unit, size in _LARGE.items() if value[0] >= size), ("", 1))
        return f"{value[0] / size:.3g} {unit}FLOP"
    return f"{value[0] / 1e6:.3g} M" if value[0] >= 1e5 else f"{value[0]:.0f}"


def by_task_tables(compared: Sequence[Group]) -> list[Table]:
    """The groups beside each other, task by task: before a task is learned, just after, and at the end."""
    titles = {
        "transfer": "Before a task is learned (Transfer)",
        "just_learned": "When it has just been learned",
        "last": "At the end (Last)",
    }
    names = [group.name for group in compared]
    if len(set(names)) < len(names):
        names = [printable(f"{group.recipe}: {group.name}") for group in compared]
    tasks = list(dict.fromkeys(task for group in compared for task in group.tasks))
    tables = []
    for metric, title in titles.items():
        values = [group.by_task(metric) for group in compared]
        rows: list[list[Cell]] = [[task, *(value.get(task) for value in values)] for task in tasks]
        rows.append(["mean", *(group.mean_of(metric) for group in compared)])
        rows = [row for row in rows if any(cell is not None for cell in row[1:])]
        if rows:
            tables.append(Table(title=title, head=["task", *names], rows=rows, digits=1))
    held_out = held_out_table(compared, names)
    return [*tables, *([held_out] if held_out else [])]


def notes_on(results: Sequence[Result], compared: Sequence[Group]) -> Iterator[str]:
    """Why the numbers of these runs may not be comparable."""
    if len({str(sorted(group.protocol.items())) for group in compared}) > 1:
        yield "these runs were evaluated by different protocols; their numbers are not comparable"
    elif len({str(group.tasks) for group in compared}) > 1:
        yield "these runs learned different tasks, or in different orders"
    repeated = sum(result.status == "complete" for result in results) - sum(len(group.seeds) for group in compared)
    if repeated:
        yield f"{repeated} of these runs repeat a seed; only the latest run of each seed counts"
    yield from differing_machines(results)
    labels = [(group.recipe, group.name) for group in compared]
    if len(set(labels)) < len(labels):
        yield "lines of the same name differ in their settings; compare the `recipe.yaml` of their runs"


def published_text(results: Sequence[Result], order: str | None = None) -> str:
    """The complete runs beside the published rows of their protocol: warnings first, then a table for each metric."""
    parts = ["\n".join(_comparison(comparison)) for comparison in compare_with_published(results, order)]
    left_out = [f"left out: {heading(result)}: {result.status}" for result in results if result.status != "complete"]
    return "\n\n".join([*parts, *(["\n".join(left_out)] if left_out else [])])


def _comparison(comparison: Comparison) -> Iterator[str]:
    meaning = explanations()
    yield from _warnings(comparison)
    if not comparison.on_published:  # never in one table with numbers of MTIL
        for run in comparison.runs:
            means = [f"{metric.capitalize()} {cell(*mean)}" for metric in METRICS if (mean := run.mean(metric))]
            yield f"{run.name}, on {printable(str(run.group.protocol.get('stream')))}:   {'   '.join(means)}"
        yield ""
    steps = comparison.metrics != METRICS
    backbone = meaning["backbone_of_steps" if steps else "backbone"]
    protocol = f"{meaning['classes'][comparison.classes]}; {words_for_shots(comparison.shots)}; {backbone}"
    what = f"class by class on {comparison.order}" if steps else f"on MTIL, order {comparison.order}"
    yield f"Published {what}: {protocol}"
    footnotes = {note: i for i, note in enumerate(dict.fromkeys(row.note for row in comparison.rows if row.note), 1)}
    for metric in comparison.metrics:
        yield ""
        yield from _metric_table(comparison, metric, footnotes)
    yield ""
    yield from (f"({i}) {note}" for note, i in footnotes.items())
    for split in dict.fromkeys(row.split for row in comparison.rows):
        yield f"split {split}: {meaning['splits'][split]}"
    for source in dict.fromkeys(source for row in comparison.rows for source in row.sources):
        yield f"source {source}: {meaning['sources'][source]}"


def _warnings(comparison: Comparison) -> Iterator[str]:
    """Warnings that concern all runs once, the others with the name of their run."""
    shared = [w for w in comparison.runs[0].warnings if all(w in run.warnings for run in comparison.runs)]
    yield from (f"warning: {warning}" for warning in shared)
    for run in comparison.runs:
        yield from (f"warning: {run.name}: {warning}" for warning in run.warnings if warning not in shared)


def _metric_table(comparison: Comparison, metric: str, footnotes: Mapping[str, int]) -> Iterator[str]:
    """One metric: the runs first, then the published rows, those measured on the runs' split before the others."""
    published = [row for row in comparison.rows if row.metric == metric]
    splits = sorted(
        dict.fromkeys(row.split for row in published), key=lambda s: (s == NOT_STATED, s != comparison.split)
    )
    published = [row for split in splits for row in published if row.split == split]
    runs = [(run, mean) for run in comparison.runs if comparison.on_published and (mean := run.mean(metric))]
    tasks = list(ORDERS.get(comparison.order, ())) if runs or any(row.cells for row in published) else []

    def values(cells: Mapping[str, float]) -> list[str]:
        return [f"{cells[task]:.1f}" if task in cells else "-" for task in tasks]

    rows = [[f"{metric.capitalize()}  ", *tasks, "mean", " source"]]
    rows += [
        [f"{run.name}{' (!)' if run.warnings else ''}  ", *values(run.by_task(metric)), cell(*mean)]
        for run, mean in runs
    ]
    for row in published:
        label = f"{row.method} ({footnotes[row.note]})" if row.note else row.method
        rows.append([f"{label}  ", *values(row.cells), f"{row.mean:.1f}", f" {' '.join(row.sources)}"])
    mean_width = 13 if any(len(run.group.seeds) > 1 for run, _ in runs) else 6
    lines = columns(rows, f"<{'>' * len(tasks)}><", [0, *[5] * len(tasks), mean_width, 0], gap=" ")
    yield lines[0]
    yield "-" * width(lines[0])
    yield from lines[1 : 1 + len(runs)]
    split = None
    for row, line in zip(published, lines[1 + len(runs) :], strict=True):
        if row.split != split:
            split = row.split
            yield f"  {_split_title(comparison, split)}"
        yield line


def _split_title(comparison: Comparison, split: str) -> str:
    """How the runs relate to the rows that were measured on a split."""
    if split == NOT_STATED:
        return "split not stated" + (": compare with care" if comparison.on_published else "")
    if not comparison.on_published:
        return f"split {split}"
    if split != comparison.split:
        return f"split {split}: not the runs', not comparable with them"
    marked = any(run.warnings for run in comparison.runs)
    return f"split {split}, the runs' own" + (" (but see the warnings for the rows marked with !)" if marked else "")


def _tasks(parent: Mapping[str, Any]) -> str:
    return f"{parent.get('tasks')} task{'s' * (parent.get('tasks') != 1)}"
