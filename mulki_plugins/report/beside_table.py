"""Runs and published rows as text: one table for each metric, the warnings before them, the sources after them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from mulki_plugins.characters import printable
from mulki_plugins.report.beside import Beside, beside, by_dataset, mean_of, shots_in_words
from mulki_plugins.report.compare import cell
from mulki_plugins.report.published import METRICS, NOT_STATED, ORDERS, Row, explanations
from mulki_plugins.report.result import Result
from mulki_plugins.report.table import heading


def beside_text(results: Sequence[Result], order: str | None = None) -> str:
    """The complete runs, those of one protocol together, beside the published rows; the others are named."""
    parts = ["\n".join(_lines(each)) for each in beside(results, order)]
    left = [f"left out: {heading(result)}: {result.status}" for result in results if result.status != "complete"]
    return "\n\n".join([*parts, *(["\n".join(left)] if left else [])])


def _lines(each: Beside) -> Iterator[str]:
    said = explanations()
    yield from _warnings(each)
    if not each.on_mtil:  # never in one table with numbers of MTIL
        for run in each.runs:
            found = [(metric, mean_of(run.group, metric)) for metric in METRICS]
            values = "   ".join(f"{metric.capitalize()} {cell(*mean)}" for metric, mean in found if mean)
            yield f"{run.name}, on {printable(str(run.group.protocol.get('stream')))}:   {values}"
        yield ""
    protocol = f"{said['classes'][each.classes]}; {shots_in_words(each.shots)}; {said['backbone']}"
    yield f"Published on MTIL, order {each.order}: {protocol}"
    numbers = {note: i for i, note in enumerate(dict.fromkeys(row.note for row in each.rows if row.note), 1)}
    for metric in METRICS:
        yield ""
        yield from _table(each, metric, numbers)
    yield ""
    yield from (f"({i}) {note}" for note, i in numbers.items())
    for split in dict.fromkeys(row.split for row in each.rows):
        yield f"split {split}: {said['splits'][split]}"
    for source in dict.fromkeys(source for row in each.rows for source in row.sources):
        yield f"source {source}: {said['sources'][source]}"


def _warnings(each: Beside) -> Iterator[str]:
    """Those of all runs once, those of some with their names."""
    shared = [w for w in each.runs[0].warnings if all(w in run.warnings for run in each.runs)]
    yield from (f"warning: {warning}" for warning in shared)
    for run in each.runs:
        yield from (f"warning: {run.name}: {warning}" for warning in run.warnings if warning not in shared)


def _table(each: Beside, metric: str, numbers: Mapping[str, int]) -> Iterator[str]:
    """One metric: the runs first, then the published rows, those of the runs' own split before the others."""
    rows = [row for row in each.rows if row.metric == metric]
    runs = [(f"{run.name} (!)" if run.warnings else run.name, run.group) for run in each.runs if each.on_mtil]
    runs = [(name, group) for name, group in runs if mean_of(group, metric)]
    columns = list(ORDERS[each.order]) if runs or any(row.cells for row in rows) else []
    names = [name for name, _ in runs] + [_named(row, numbers) for row in rows]
    label = max(map(len, (metric, *names)), default=0) + 2
    mean = 14 if any(len(group.seeds) > 1 for _, group in runs) else 7

    def line(name: str, cells: Mapping[str, float], last: str) -> str:
        shown = "".join(f"{f'{cells[c]:.1f}' if c in cells else '-':>{_width(c)}}" for c in columns)
        return f"{name:<{label}}{shown}{last:>{mean}}"

    head = (
        f"{metric.capitalize():<{label}}" + "".join(f"{c:>{_width(c)}}" for c in columns) + f"{'mean':>{mean}}  source"
    )
    yield head
    yield "-" * len(head)
    for name, group in runs:
        yield line(name, by_dataset(group, metric), cell(*mean_of(group, metric)))  # type: ignore[misc]
    for split in sorted(dict.fromkeys(row.split for row in rows), key=lambda s: (s == NOT_STATED, s != each.split)):
        yield f"  {_relation(each, split)}"
        for row in rows:
            if row.split == split:
                yield f"{line(_named(row, numbers), row.cells, f'{row.mean:.1f}')}  {' '.join(row.sources)}"


def _relation(each: Beside, split: str) -> str:
    """How the runs stand to the rows that were measured on a split."""
    if split == NOT_STATED:
        return "split not stated" + (": compare with care" if each.on_mtil else "")
    if not each.on_mtil:
        return f"split {split}"
    if split != each.split:
        return f"split {split}: not the runs', not comparable with them"
    marked = any(run.warnings for run in each.runs)
    return f"split {split}, the runs' own" + (" (but see the warnings on what is marked with !)" if marked else "")


def _named(row: Row, numbers: Mapping[str, int]) -> str:
    return f"{row.method} ({numbers[row.note]})" if row.note else row.method


def _width(column: str) -> int:
    return max(5, len(column)) + 1
