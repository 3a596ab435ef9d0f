"""What stands beside the matrix: held-out tasks, which enter no metric, and the accuracy among all classes seen so far."""

from __future__ import annotations

from collections.abc import Sequence

from mulki_plugins.characters import printable
from mulki_plugins.report.compare import Group, MeanAndDeviation, mean_and_deviation
from mulki_plugins.report.formats import Cell, Table
from mulki_plugins.report.result import Result

SEEN = "seen"
"""The heading of the accuracy among all seen classes, on the images of all learned tasks."""
HELD_OUT_NOTE = "in brackets: held out, tested and never learned, in no metric"


def columns_beside(result: Result) -> dict[str, list[float | None]]:
    """By heading, a value for each row of the matrix's table: the zero-shot row, if there is one, then the others.

    `seen` is there if the run has the metric `incremental`; a held-out task stands in brackets.
    """
    columns: dict[str, list[float | None]] = {}
    if "incremental" in result.metrics and result.test_images:
        from mulki_plugins.metrics import incremental_by_step  # numpy, which other commands do without

        try:
            steps: list[float] = incremental_by_step(result.matrix, result.counted_images).tolist()
        except ValueError:  # an extended run may lack accuracies, and an unfinished one has none at the end
            steps = []
        if steps:
            columns[SEEN] = [*([None] if result.zero_shot else []), *steps]
    for name, values in result.held_out.items():
        shown = values if result.base != "joint" else [*values[:1], *values[1:][-1:]]
        columns[f"({name})"] = [*shown]
    return columns


def held_out_means(group: Group, task: str) -> tuple[MeanAndDeviation, MeanAndDeviation] | None:
    """The accuracy on a held-out task before any training and after the last task; None if a run did not measure it."""
    columns = [run.held_out.get(task, []) for run in group.runs]
    if not all(columns):
        return None
    return mean_and_deviation([c[0] for c in columns]), mean_and_deviation([c[-1] for c in columns])


def held_out_tasks(compared: Sequence[Group]) -> list[str]:
    """The held-out tasks of all groups."""
    return list(dict.fromkeys(task for group in compared for run in group.runs for task in run.held_out))


def held_out_table(compared: Sequence[Group], names: Sequence[str]) -> Table | None:
    """The groups beside each other on held-out tasks, at the end and before any training; None if there are none."""
    rows: list[list[Cell]] = []
    for task in held_out_tasks(compared):
        means = [held_out_means(group, task) for group in compared]
        for label, place in ((task, 1), (f"{task}, zero-shot", 0)):
            rows.append([printable(label), *(None if mean is None else mean[place] for mean in means)])
    return (
        Table(title="Held out: never learned, at the end", head=["task", *names], rows=rows, digits=1) if rows else None
    )
